"""What the commands share: options, prompts and token lists, words to people, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
import os
import re
import shutil
import stat
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ..errors import InputError, KqprefillError
from ..terminal import print_json, print_text, shown
from .interrupts import reason
from .outputs import STDIO
from .sources import from_home, model_path

if TYPE_CHECKING:
    from ..backends.cuda.weights.plan import Plan
    from ..engine.model import Model
    from ..gguf import GGUFFile
    from ..models.family import Family
    from ..synthetic import SyntheticFile

LARGEST_TEXT = 1 << 30  # bytes of a text that is read whole: what has more is cut by who gives it, or never ends
_READ_AT_ONCE = 1 << 22
# A command's function, which an option is added to.
Command = TypeVar("Command", bound=Callable[..., Any])


def special_option(command: Command) -> Command:
    """--no-special."""
    return click.option(
        "--no-special",
        is_flag=True,
        help="Texts of control tokens (`<start_of_turn>`) are plain text; else they are these tokens.",
    )(command)


def template_option(command: Command) -> Command:
    """--chat-template."""
    return click.option(
        "--chat-template", metavar="FILE", help="A chat template (Jinja) to use in place of the model's own."
    )(command)


def read_template(path: str | None) -> str | None:
    """The text of --chat-template, None where it is not given. Raises as `read_text_file` does."""
    return None if path is None else read_text_file(path, "--chat-template")


def layers_option(command: Command) -> Command:
    """--layers."""
    return click.option(
        "--layers", metavar="N", type=click.IntRange(1), help="Only the first N layers of a SHAPE:RECIPE."
    )(command)


def batch_option(command: Command) -> Command:
    """--batch-tokens."""
    return click.option(
        "--batch-tokens",
        default=None,
        metavar="T",
        type=click.IntRange(1),
        envvar="KQPREFILL_BATCH_TOKENS",
        show_envvar=True,
        help="Tokens that are packed into one batch, at most.  [default: 8192; where layers are streamed, up to 32768 "
        "that hide the copies]",
    )(command)


def open_file(name: str, layers: int | None = None) -> GGUFFile | SyntheticFile:
    """A GGUFFile, or the SyntheticFile of a SHAPE:RECIPE, perhaps of its first layers. Raises GGUFError, InputError;
    KqprefillError for a name that may be of a file that is missing."""
    from ..gguf import GGUFFile
    from ..synthetic import SyntheticFile
    from ..synthetic.shapes import SHAPES

    path = model_path(name)
    is_file = path != name or os.path.exists(name) or name.endswith(".gguf") or os.sep in name
    if is_file and layers is not None:
        raise click.UsageError(f"--layers {layers}: {name} is a file; only a SHAPE:RECIPE is made with fewer layers")
    if is_file:
        return GGUFFile(path)
    try:
        return SyntheticFile.named(name, layers)
    except InputError as error:
        if ":" in name or name in SHAPES:
            raise
        raise KqprefillError(error) from None


def refuse_too_large(file: SyntheticFile, size_of: Callable[[SyntheticFile], int], room: int, words: str) -> None:
    """An InputError where a model in the making has no room, which says how many of its layers have.

    size_of: bytes that it, or one of fewer layers, takes; room: bytes that may be taken. words: a sentence with
    `{needed}` and `{room}`.
    """
    needed = size_of(file)
    if needed > room:
        most = file.most_layers(size_of, room)
        advice = f"give --layers {most} or fewer" if most else "not even one of its layers has room"
        raise InputError(f"{words.format(needed=size(needed), room=size(room))}: {advice}")


def plan_lines(plan: Plan, family: Family) -> Iterator[str]:
    """A residency Plan for people."""
    of = "" if plan.share.is_first and plan.share.is_last else f" for {plan.share}"
    yield f"GPU memory{of}: {size(plan.nbytes)} of {size(plan.budget)} that may be taken"
    width = max(map(len, plan.parts))
    for name, nbytes in plan.parts.items():
        yield f"  {name:{width}}  {size(nbytes):>10}"
    rows = plan.streamed and plan.share.holds_embedding(family)
    yield f"layers: {len(plan.resident)} of {len(plan.share.layers)} stay, {len(plan.streamed)} are streamed" + (
        ", and the embedding's rows" if rows else ""
    )


def how_it_ran(model: Model) -> str:
    """A model's backend, device and precision, for people."""
    return f"{model.backend.name} ({model.backend.device_name}), {model.precision}"


def say_loaded(model: Model) -> None:
    """What an open Model's backend has loaded, and where, on stderr."""
    loaded = model.backend.loaded
    if not model.backend.plans or loaded is None:
        return
    rate = loaded.nbytes / loaded.seconds / 1e9
    say_plain(f"weights that stay: {size(loaded.nbytes)} in {loaded.seconds:.3f} s, {rate:.1f} GB/s")
    for plan in model.backend.plans:
        for line in plan_lines(plan, model.family):
            say_plain(line)
    for line in model.backend.report:
        say_plain(line)


def say_batches(model: Model, batch_tokens: int | None, top: int = 0) -> None:
    """How large the batches were that an open Model scored, and why, on stderr: where the backend has chosen it."""
    if why := model.backend.batch_size(model.family, batch_tokens, top).why:
        say_plain(why)


def is_in_file(text: str) -> bool:
    """Whether an option's text is somewhere else: in stdin (`-`) or a file (`@FILE`)."""
    return text == STDIO or text.startswith("@")


def read_text(text: str, option: str, may_be_empty: bool = False) -> str:
    """A prompt as it is, from stdin (`-`) or from a file (`@FILE`). Raises as `read_text_file` does."""
    return read_text_file(text.removeprefix("@"), option, may_be_empty) if is_in_file(text) else text


def read_text_file(path: str, option: str, may_be_empty: bool = False) -> str:
    """The text in a file (`-`: stdin), without the mark that some editors begin a file with.

    Raises KqprefillError where it cannot be read, is no text, is too large, or holds nothing.
    """
    try:
        if path == STDIO:
            text = _read_whole(sys.stdin.buffer).decode("utf-8-sig")
        else:
            with open(from_home(path), "rb") as file:
                text = _read_whole(file).decode("utf-8-sig")
    except _TooLargeError:
        raise KqprefillError(
            f"{option} {path}: a text of more than {size(LARGEST_TEXT)}; give a part of it (head -c)"
        ) from None
    except OSError as error:
        raise KqprefillError(f"{option} {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise KqprefillError(f"{option} {path}: not a text file (byte {error.start} is no UTF-8)") from None
    if not (text or may_be_empty):
        raise KqprefillError(f"{option} {path}: it is empty")
    return text


class _TooLargeError(Exception):
    """There is more than LARGEST_TEXT bytes."""


def _read_whole(file: BinaryIO) -> bytes:
    """All of a file or a stream, of which some never end (/dev/zero). Raises _TooLargeError, OSError."""
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size > LARGEST_TEXT:
        raise _TooLargeError
    pieces, left = list[bytes](), LARGEST_TEXT
    while piece := file.read(_READ_AT_ONCE):
        left -= len(piece)
        if left < 0:
            raise _TooLargeError
        pieces.append(piece)
    return b"".join(pieces)


def read_tokens(text: str, option: str = "--tokens") -> list[int]:
    """IDs from `1,2,3` or `1 2 3`, from stdin (`-`) or from a file (`@FILE`). Raises InputError where what is given in
    the command itself is wrong, KqprefillError where a file is."""
    where = "stdin" if text == STDIO else text[1:] if text.startswith("@") else option
    kind = KqprefillError if is_in_file(text) else InputError
    ids = [_integer(word, where, "a token id", kind) for word in read_text(text, option).replace(",", " ").split()]
    if not ids:
        raise kind(f"{where}: the prompt is empty; give at least one token id")
    return ids


def read_lengths(texts: Sequence[str], option: str) -> list[int]:
    """Prompt lengths from `128,512`, given once or several times. Raises InputError."""
    return [_integer(word.strip(), option, "a prompt length") for text in texts for word in text.split(",")]


def _integer(word: str, where: str, what: str, kind: type[KqprefillError] = InputError) -> int:
    """Of ASCII digits only: int() would read 1_0 and other scripts' digits as well. kind: of the error, where it is no
    integer."""
    if not re.fullmatch("-?[0-9]{1,30}", word):
        raise kind(f"{where}: {word[:40]!r} is not {what}; give integers, separated by commas or spaces")
    return int(word)


def has_piped_stdin() -> bool:
    """Whether someone feeds stdin: a pipe, a file or a socket, not a terminal or nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def say(line: str) -> None:
    """A line to people, after our name. A stderr that cannot be written stops no work."""
    say_plain(f"kqprefill: {line}")


def say_plain(line: str) -> None:
    """A line to people, as it is."""
    with suppress(OSError):
        print_text(line, sys.stderr)
        sys.stderr.flush()


def wrapped(line: str) -> str:
    """A line of words as a terminal shows it best: cut between words at its width, what follows indented."""
    if not sys.stdout.isatty():
        return line
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned, numbers to the right.

    On a terminal it fits its width: the longest texts are cut, which are there for people to recognise.
    """
    rows = [list(row) for row in (head, *lines)]
    right = [all(_NUMBER.fullmatch(row[i]) or not row[i] for row in rows[1:]) for i in range(len(head))]
    if sys.stdout.isatty():
        rows = [[shown(cell) for cell in row] for row in rows]
        _fit(rows, right, shutil.get_terminal_size().columns)
    widths = [max(3, *(columns_of(row[i]) for row in rows)) for i in range(len(head))]
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right)]
    return "\n".join("| " + " | ".join(map(_padded, row, widths, right)) + " |" for row in [rows[0], rule, *rows[1:]])


# A number, with its unit or its spread: "18 MiB", "2.49 ± 0.23", "84.0%". Not "18 Q4_K, 9 Q8_0", nor a shape.
_NUMBER = re.compile(r"[-+<]?[0-9][0-9.,e]*( ?%| [KMGT]?i?B| ± [0-9.e]+)?")


def _fit(rows: list[list[str]], right: Sequence[bool], width: int) -> None:
    """Cut the texts of the widest columns, in place, until rows take so many columns of a terminal or cannot."""
    widths = [max(columns_of(row[i]) for row in rows) for i in range(len(right))]
    over = sum(max(3, w) + 3 for w in widths) + 1 - width
    while over > 0:
        i = max((i for i, to_right in enumerate(right) if not to_right), key=lambda i: widths[i], default=None)
        if i is None or widths[i] <= 8:
            return
        widths[i] -= 1
        over -= 1
        for row in rows:
            row[i] = _cut(row[i], widths[i])


def _cut(text: str, width: int) -> str:
    if columns_of(text) <= width:
        return text
    text = text.removesuffix("…")
    while columns_of(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _padded(text: str, width: int, to_right: bool) -> str:
    space = " " * (width - columns_of(text))
    return space + text if to_right else text + space


def columns_of(text: str) -> int:
    """The columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


JSON_VERSION = 1  # of the objects that docs/json.md describes


def print_object(described: dict[str, Any]) -> None:
    """Print one of the objects that docs/json.md describes, as JSON on stdout."""
    print_json({"version": JSON_VERSION, **described})


def parameters(count: int) -> str:
    """A number of parameters for people, in millions below a thousand of them, as llama-bench says it."""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
