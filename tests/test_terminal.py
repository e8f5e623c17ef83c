"""What a terminal is shown of texts from files, and what a pipe gets of them."""

import io
import json
import sys
import unicodedata

import pytest

from kqprefill.errors import KqprefillError
from kqprefill.terminal import json_value, print_json, print_text, shown, shown_json

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


def test_every_character_there_is():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    for printed, kept in ((shown(everything), "\u200c\u200d"), (shown_json(everything), "\u200c\u200d\n")):
        assert not [c for c in {*printed} - {*kept} if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn")]
        assert len({*printed}) > 140_000  # letters of all scripts among them


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
