"""What a terminal is shown of texts from files, and what a pipe gets of them."""

import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace
import unicodedata

import numpy as np
import pytest

from kqprefill.cli.page import Page
from kqprefill.engine.scoring import Item, Scored
from kqprefill.errors import KqprefillError
from kqprefill.terminal import json_value, print_json, print_text, shown, shown_json
from test_cli import kq
from test_models import variant

HARMFUL = [
    "\x1b]0;title\x07",  # OSC
    "\x1b[2J",
    "\x9b31m",  # C1's CSI
    "\x7f",
    "\r",
    "\x00",
    "\u202e",  # from right to left, whatever it is
    "\u2066",
    "\u200f",
    "\u2028",
    "\ufeff",
    "\udc80",  # a lone surrogate
    "\ue000",  # private use
    "\u0378",  # unassigned
    "\U000e0041",  # a tag
    "\U0010ffff",
]
HARMLESS = [
    "plain text",
    "Grüße, 日本\u3000語",
    "a\u00a0b",
    "👨\u200d👩\u200d👧",
    "نمی\u200cخواهم",
    "e\u0301",
    "\u2581x",
]


class Stream(io.TextIOWrapper):
    """A stream that is a terminal, or is none."""

    def __init__(self, terminal, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self._terminal = terminal

    def isatty(self):
        return self._terminal

    def written(self):
        self.flush()
        return self.buffer.getvalue()


@pytest.mark.parametrize("text", HARMFUL, ids=ascii)
def test_what_a_terminal_would_obey_is_escaped(text):
    assert shown(f"a{text}b").isprintable() and shown(text).isascii() and shown(text).startswith("\\")
    encoded = shown_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert encoded.isprintable() and json.loads(encoded) == {text: [text]}
    assert str(KqprefillError(text)).isprintable()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_only_to_be_read_is_left_alone(text):
    assert shown(text) == text
    assert shown_json(json.dumps(text, ensure_ascii=False)) == json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize(
    "end,least", [(0x3000, 10_000), pytest.param(sys.maxunicode + 1, 140_000, marks=pytest.mark.slow)]
)
def test_every_character_there_is(end, least):
    everything = "".join(map(chr, range(end)))
    for printed, kept in ((shown(everything), "\u200c\u200d"), (shown_json(everything), "\u200c\u200d\n")):
        assert not [c for c in {*printed} - {*kept} if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn")]
        assert len({*printed}) > least  # letters of all scripts among them


def test_lines_are_kept_where_they_are_meant():
    assert shown("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b" and shown("a\nb") == "a\\nb"


@pytest.mark.parametrize("text", ["\x1b[31m\n", "\u202eabc", "日本"])
def test_pipes_get_data_and_terminals_get_escapes(text):
    for printing, again in ((print_text, str), (print_json, json.dumps)):
        pipe, terminal = Stream(False), Stream(True)
        printing(text, pipe)
        printing(text, terminal)
        assert terminal.written().decode().replace("\n", "").isprintable()
        assert printing is print_json or pipe.written().decode() == text + "\n"
        if again is json.dumps:
            assert json.loads(pipe.written()) == json.loads(terminal.written()) == text


def test_every_text_can_be_printed():
    """A path's stray bytes, which Python holds as lone surrogates; and characters that an encoding has not."""
    for text, encoding, written in (
        ("m\udcff", "utf-8", b"m\xff\n"),
        ("m\ud800", "utf-8", b"m\\ud800\n"),
        ("m\u20ac", "ascii", b"m\\u20ac\n"),
    ):
        pipe = Stream(False, encoding)
        print_text(text, pipe)
        assert pipe.written() == written
    pipe = Stream(False)
    print_json("m\udcff", pipe)
    assert json.loads(pipe.written()) == "m\udcff"


def test_json_has_no_nan():
    with pytest.raises(ValueError):
        print_json(float("nan"), Stream(False))
    values = {"a": [float("nan"), 1.5, float("inf")], "b": (float("-inf"), True, None, "x")}
    assert json_value(values) == {"a": ["NaN", 1.5, "Infinity"], "b": ["-Infinity", True, None, "x"]}


def on_terminal(*args):
    """(exit status, what a terminal gets) of a command of which stdin, stdout and stderr are one."""
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kqprefill", *map(str, args)], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(own, 1 << 16)
        except OSError as error:  # the last one has closed it
            assert error.errno == errno.EIO
            break
        if not part:
            break
        parts.append(part)
    os.close(own)
    return process.wait(), b"".join(parts).decode()


HOSTILE = "\x1b]0;owned\x07\x9b31m\u202eevil\x08\r\n\x1b[2J"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model whose every text would take the terminal over."""
    path = tmp_path_factory.mktemp("hostile") / "model.gguf"
    values = {
        "general.name": HOSTILE,
        "tokenizer.ggml.model": HOSTILE,
        "tokenizer.ggml.tokens": [f"{HOSTILE}{i}" for i in range(256)],
        f"key{HOSTILE}": f"value{HOSTILE}",
        "not.finite": float("nan"),
    }
    return variant(path, metadata=values, tensors={f"t{HOSTILE}": np.ones(4, np.float32)})


INSPECTIONS = [[], ["--json"], ["--tensors"], ["--tensors", "--json"], ["--metadata"], ["--metadata", "--json"]]
INSPECTIONS += [["--metadata", key] for key in ("general.name", "tokenizer.ggml.tokens", HOSTILE, f"key{HOSTILE}")]
INSPECTIONS += [["--metadata", "tokenizer.ggml.tokens", "--json"]]


@pytest.mark.parametrize("args", INSPECTIONS, ids=lambda args: ascii(" ".join(args)))
def test_inspect_on_a_terminal_and_in_a_pipe(args, hostile):
    status, seen = on_terminal("inspect", hostile, *args)
    assert seen.replace("\r\n", "").isprintable() and "Traceback" not in seen
    assert status == (2 if args[-1:] == [HOSTILE] else 0)
    piped = kq("inspect", hostile, *args)
    assert piped.returncode == status
    if "--json" in args:
        assert json.loads(piped.stdout) == json.loads(seen)
    elif "general.name" in args:
        assert piped.stdout.decode() == HOSTILE + "\n"


def test_doctor_on_a_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("KQPREFILL_CACHE_DIR", f"{tmp_path}/{HOSTILE}")
    for args in ([], ["--json"]):
        status, seen = on_terminal("doctor", *args)
        assert status in (0, 1) and seen.replace("\r\n", "").isprintable() and "evil" in seen


def test_each_token_of_the_page_is_isolated():
    texts = ["\u202eabc", "</bdi>", "\x1b[31m", "d"]
    written = io.BytesIO()
    page = Page(
        written,
        SimpleNamespace(
            token_text=texts.__getitem__, precision="exact", backend=SimpleNamespace(name="cpu", device_name="a CPU")
        ),
        "m\u202e",
        2,
    )
    one = np.zeros((2, 2), np.int32)
    page.add(0, Item([0, 1, 2, 3]), [Scored(np.array([2, 3], np.int32), np.array([-1.0, -2.0]), one, -np.ones((2, 2)))])
    page.end()
    text = written.getvalue().decode()
    assert re.search(r'<span class="p"><bdi>\u202eabc</bdi><bdi>&lt;/bdi&gt;</bdi></span>', text)
    assert len(re.findall(r"<bdi class=\"t s\d\" data-p=\"-[12]\.0000\"[^>]*>[^<]*</bdi>", text)) == 2
    assert text.count("\u202e") == 1 and "\\\\u202eabc" in text  # beside the isolated one, only as an escape
