"""Text from files as a terminal may be shown it.

A terminal obeys some characters rather than showing them: a model's vocabulary, its metadata or a file's name could
move the cursor, set the title, or turn the order of a line round. Whatever comes from a file goes through `shown` (or
`shown_json`) on its way to a terminal. What goes to a pipe or a file is data, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from math import isfinite
import sys
from typing import Any, TextIO

# General categories of Unicode that a terminal gets as escapes: control (C0, C1), format (bidi controls, tags),
# surrogate, private use, unassigned; the separators of lines and paragraphs.
_UNSAFE = frozenset("Cc Cf Cs Co Cn Zl Zp".split())
# Format characters that only join or part the letters beside them, as Persian and emoji need.
_JOINERS = frozenset("\u200c\u200d")


def shown(text: object, keep: str = "") -> str:
    """What a terminal may be shown of a text: each character that it might obey, or not show, as an escape (`\\x1b`).

    keep: characters to be left alone though they are such, "\\n" and "\\t" where a text has lines.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_unsafe(c) else c.encode("unicode_escape").decode() for c in text)


def shown_json(encoded: str) -> str:
    """The same for JSON text, whose own escapes are used: it is the same JSON afterwards."""
    if encoded.isprintable():
        return encoded
    return "".join(c if c == "\n" or not _is_unsafe(c) else _json_escape(c) for c in encoded)


def print_text(text: object, file: TextIO | None = None) -> None:
    """Print a text and a newline on stdout, or on another stream: on a terminal as `shown`, lines and tabs kept."""
    file = sys.stdout if file is None else file
    _write(shown(text, "\n\t") if file.isatty() else str(text), file)


def print_json(value: object, file: TextIO | None = None, indent: int | None = None) -> None:
    """Print a value as JSON and a newline on stdout, or on another stream; on a terminal as `shown_json`.

    Raises ValueError for NaN and infinities, which JSON has not (see `json_value`).
    """
    file = sys.stdout if file is None else file
    encoded = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if any("\ud800" <= c <= "\udfff" for c in encoded):  # half a pair, which JSON can spell and UTF-8 cannot
        encoded = json.dumps(value, allow_nan=False, indent=indent)
    _write(shown_json(encoded) if file.isatty() else encoded, file)


def json_line(value: object, terminal: bool) -> bytes:
    """A value as a line of JSON, in UTF-8; for a terminal as `shown_json`. Raises ValueError as `print_json` does."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if terminal:
        text = shown_json(text)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but UTF-8 cannot
        return json.dumps(value, allow_nan=False).encode() + b"\n"


def json_value(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON has not, as the texts "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: json_value(held) for key, held in value.items()}
    return [json_value(held) for held in value] if isinstance(value, (list, tuple)) else value


def _write(text: str, file: TextIO) -> None:
    """A line to a text stream. What its encoding has no bytes for becomes escapes; a path's stray bytes stay bytes."""
    try:
        file.write(text + "\n")
    except UnicodeEncodeError:
        encoding = file.encoding or "utf-8"
        try:
            data = text.encode(encoding, "surrogateescape")
        except UnicodeEncodeError:
            data = text.encode(encoding, "backslashreplace")
        file.flush()
        file.buffer.write(data + b"\n")
        file.buffer.flush()


def _json_escape(character: str) -> str:
    """A character in JSON's spelling, two halves where it is beyond 16 bits."""
    halves = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join("\\u" + halves[at : at + 4] for at in range(0, len(halves), 4))


def _is_unsafe(character: str) -> bool:
    from unicodedata import category  # where a text has other characters than printable ones

    return category(character) in _UNSAFE and character not in _JOINERS
