"""A record: what a line of JSON, or a row of a table, asks for, and what of it is handed on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InputError

if TYPE_CHECKING:
    from ..engine.scoring import Item

_RECORD = 64  # what a record costs by itself, in tokens
ASKED = "tokens", "prompt", "messages", "completion", "choices"  # keys of a record that say what to score
OURS = frozenset(  # keys of a result
    (
        "index n_tokens logprob mean_logprob perplexity best best_per_token choices error "
        "token_logprobs greedy_tokens top_tokens top_logprobs"
    ).split()
)
_MOST_NESTED = 100  # lists and objects in one another: far below where Python's JSON gives up
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One line of the input, or one row.

    index: its place among the records, from 0; name, line: its file's name, and its place there, from 1; end: where it
    ends in the input, in bytes. extras: what is handed on, by key. item: what to score, or error: what is wrong with
    the line. unit: what its place is a number of, "line" or "row".
    """

    index: int
    name: str
    line: int
    end: int
    extras: dict[str, Any]
    item: Item | None = None
    error: str | None = None
    unit: str = "line"

    @property
    def place(self) -> str:
        """Its place in its file, for people."""
        return f"{self.unit} {self.line}"

    @property
    def where(self) -> str:
        """Its place, for people."""
        return f"{self.name}: {self.place}"

    @property
    def cost(self) -> int:
        """What it takes of what is read ahead, in tokens."""
        return _RECORD + (self.item.tokens if self.item else 0)


@dataclass(frozen=True)
class Reader:
    """How records are read.

    make(content): the Item of a record; raises InputError. keep_as: the key under which all of a record's other keys
    are handed on; else they keep their names, and one that is named as a result's is an error. asked, ours: the keys
    that say what to compute, and those of a result. plain: a line is no JSON, but the text of a record {"text": …}.
    """

    make: Callable[[Any], Item]
    keep_as: str | None = None
    asked: Collection[str] = ASKED
    ours: Collection[str] = OURS
    plain: bool = False

    def of_line(self, index: int, name: str, line: int, end: int, text: bytes) -> Record:
        """The record of a line; what is wrong with it is in its `error`."""
        content: Any = None
        try:
            decoded = text.decode("utf-8")
            if self.plain:
                content = {"text": decoded.rstrip("\r\n")}
            else:
                content = json.loads(decoded, parse_constant=_refuse, parse_float=_finite)
            if not isinstance(content, dict):
                raise InputError("a record must be a JSON object")
            _refuse_deep(text, content)
        except InputError as error:
            why = str(error)
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} is no UTF-8"
        except json.JSONDecodeError as error:
            why = f"no JSON: {error.msg} (character {error.pos + 1} of the line)"
        except (ValueError, RecursionError) as error:
            why = f"no JSON: {error}"
        else:
            return self._record(index, name, line, end, content, "line")
        return Record(index, name, line, end, {} if self.keep_as is None else {self.keep_as: {}}, None, why)

    def of_row(self, index: int, name: str, row: int, end: int, content: Mapping[str, Any]) -> Record:
        """The record of a table's row, as a mapping of what its columns hold."""
        return self._record(index, name, row, end, content, "row")

    def _record(self, index: int, name: str, place: int, end: int, content: Mapping[str, Any], unit: str) -> Record:
        others = {key: value for key, value in content.items() if key not in self.asked}
        item, why = None, None
        try:
            taken = [] if self.keep_as else [key for key in others if key in self.ours]
            if taken:
                raise InputError(
                    f'the key "{taken[0]}" is one of the result\'s own; rename it, or put all other keys under one '
                    "with --keep-as NAME"
                )
            item = self.make(content)
        except InputError as error:
            why = str(error)
        extras = {key: value for key, value in others.items() if key not in self.ours}
        if self.keep_as is not None:
            extras = {self.keep_as: others}
        return Record(index, name, place, end, extras, item, why, unit)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is beyond a number's range")
    return value


def _refuse_deep(text: bytes, content: Any) -> None:
    """Raise InputError for what is nested so deep that it could not be handed on."""
    if text.count(b"[") + text.count(b"{") <= _MOST_NESTED:
        return
    level = [content]
    for _ in range(_MOST_NESTED):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InputError(f"it is nested more than {_MOST_NESTED} deep")
