"""JSON lines: records read ahead by a thread, results written line by line, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
import json
import math
import os
import queue
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from ..errors import InputError, KqprefillError
from .interrupts import reason
from .outputs import STDIO
from .sources import from_home

if TYPE_CHECKING:
    from ..engine.scoring import Item

_AHEAD = 1 << 16  # tokens that are read before they are needed, about: some batches
_RECORD = 64  # what a record costs by itself, in tokens
ASKED = "tokens", "prompt", "messages", "completion", "choices"  # keys of a record that say what to score
OURS = frozenset(  # keys of a result
    (
        "index n_tokens logprob mean_logprob perplexity best best_per_token choices error "
        "token_logprobs greedy_tokens top_tokens top_logprobs"
    ).split()
)
_MOST_NESTED = 100  # lists and objects in one another: far below where Python's JSON gives up
LONGEST_LINE = 256 << 20  # bytes; some files have no end of a line (/dev/zero)
_LINGER = 0.05  # seconds to wait for more, before what there is runs in a smaller batch
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One line of the input.

    index: its place among the records, from 0; name, line: its file's name, and its place there, from 1; end: where it
    ends in the input, in bytes. extras: what is handed on, by key. item: what to score, or error: what is wrong with
    the line.
    """

    index: int
    name: str
    line: int
    end: int
    extras: dict[str, Any]
    item: Item | None = None
    error: str | None = None

    @property
    def where(self) -> str:
        """Its place, for people."""
        return f"{self.name}: line {self.line}"

    @property
    def cost(self) -> int:
        """What it takes of what is read ahead, in tokens."""
        return _RECORD + (self.item.tokens if self.item else 0)


def check_inputs(paths: Sequence[str]) -> list[str]:
    """The files of records as they will be opened (`-`: stdin). Raises KqprefillError for one that cannot be read,
    before anything else is done; InputError for stdin twice."""
    if paths.count(STDIO) > 1:
        raise InputError("stdin (`-`) is given twice; it can be read once")
    found = [path if path == STDIO else from_home(path) for path in paths]
    for path in found:
        if path == STDIO:
            continue
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise KqprefillError(f"{path}: a folder, where a file of JSON lines is wanted")
            if not os.access(path, os.R_OK):
                raise KqprefillError(f"{path}: it may not be read")
        except OSError as error:
            raise KqprefillError(f"{path}: {error.strerror}") from None
    return found


class Records:
    """The records of JSONL files (`-` is stdin), one after another, read and tokenised by a thread.

    make(content): the Item of a record; raises InputError. skip: how many records there are results of already.
    keep_as: the key under which all of a record's other keys are handed on; else they keep their names, and one that is
    named as a result's is an error. asked, ours: the keys that say what to compute, and those of a result. plain: a
    line is no JSON, but the text of a record {"text": …}. Where a file cannot be read, taking its records raises
    KqprefillError.
    """

    def __init__(
        self,
        paths: Sequence[str],
        make: Callable[[Any], Item],
        skip: int = 0,
        keep_as: str | None = None,
        asked: Collection[str] = ASKED,
        ours: Collection[str] = OURS,
        plain: bool = False,
    ) -> None:
        self._paths = list(paths)
        self.several = len(self._paths) > 1
        self.name = "stdin" if self._paths == [STDIO] else ", ".join(self._paths)
        sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in self._paths]
        self.nbytes = None if None in sizes else sum(size for size in sizes if size is not None)
        self._make, self._skip, self._keep_as = make, skip, keep_as
        self._asked, self._ours, self._plain = asked, ours, plain
        self._queue: queue.Queue[Record | BaseException | None] = queue.Queue()
        self._ahead, self._taken = 0, threading.Condition()
        self.last_skipped: Record | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[Record | None]:
        """Records, and None where no more are there yet."""
        waiting = False
        while True:
            try:
                read = self._queue.get(timeout=_LINGER if waiting else None)
            except queue.Empty:
                waiting = False
                yield None
                continue
            if read is None:
                return
            if isinstance(read, BaseException):
                raise read
            waiting = True
            with self._taken:
                self._ahead -= read.cost
                self._taken.notify()
            yield read

    def _read(self) -> None:
        index = 0
        try:
            for name, line, end, text in self._lines():
                if not text.strip():
                    continue
                if index >= self._skip:
                    record = self._record(index, name, line, end, text)
                    with self._taken:
                        self._taken.wait_for(lambda: self._ahead < _AHEAD)
                        self._ahead += record.cost
                    self._queue.put(record)
                elif index == self._skip - 1:
                    self.last_skipped = self._record(index, name, line, end, text)
                index += 1
            if index < self._skip:
                raise InputError(f"{self.name} has {index} records, but the output to continue has {self._skip}")
            self._queue.put(None)
        except BaseException as error:  # raised where the records are taken
            self._queue.put(error)

    def _lines(self) -> Iterator[tuple[str, int, int, bytes]]:
        """Every line of every file: the file's name, the line's number, where it ends among all bytes, its text."""
        end = 0
        for path in self._paths:
            name = "stdin" if path == STDIO else path
            try:
                # Its thread reads it until the process ends.
                file: BinaryIO = sys.stdin.buffer if path == STDIO else open(path, "rb")  # noqa: SIM115
                for number, text in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                    if len(text) > LONGEST_LINE:
                        raise KqprefillError(f"{name}: line {number} is longer than {LONGEST_LINE >> 20} MiB")
                    end += len(text)
                    yield name, number, end, text.removeprefix(_BOM) if number == 1 else text
            except OSError as error:
                raise KqprefillError(f"{name}: {reason(error)}") from None

    def _record(self, index: int, name: str, line: int, end: int, text: bytes) -> Record:
        others: dict[str, Any] = {}
        item, why = None, None
        try:
            decoded = text.decode("utf-8")
            if self._plain:
                content = {"text": decoded.rstrip("\r\n")}
            else:
                content = json.loads(decoded, parse_constant=_refuse, parse_float=_finite)
            if not isinstance(content, dict):
                raise InputError("a record must be a JSON object")
            _refuse_deep(text, content)
            others = {key: value for key, value in content.items() if key not in self._asked}
            taken = [] if self._keep_as else [key for key in others if key in self._ours]
            if taken:
                raise InputError(
                    f'the key "{taken[0]}" is one of the result\'s own; rename it, or put all other keys under one '
                    "with --keep-as NAME"
                )
            item = self._make(content)
        except InputError as error:
            why = str(error)
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} is no UTF-8"
        except json.JSONDecodeError as error:
            why = f"no JSON: {error.msg} (character {error.pos + 1} of the line)"
        except (ValueError, RecursionError) as error:
            why = f"no JSON: {error}"
        extras = {key: value for key, value in others.items() if key not in self._ours}
        if self._keep_as is not None:
            extras = {self._keep_as: others}
        return Record(index, name, line, end, extras, item, why)


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
