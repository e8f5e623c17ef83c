"""JSON lines: records read ahead by a thread, results written line by line, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import fcntl
import json
import os
import queue
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from ..errors import InputError, KqprefillError
from .common import STDIO

if TYPE_CHECKING:
    from ..engine.scoring import Item

_AHEAD = 1 << 16  # tokens that are read before they are needed, about: some batches
_RECORD = 64  # what a record costs by itself, in tokens
ASKED = "tokens", "prompt", "completion", "choices"  # keys of a record that say what to score
_LINGER = 0.05  # seconds to wait for more, before what there is runs in a smaller batch


@dataclass(frozen=True)
class Record:
    """One line of the input.

    index: its place among the records, from 0; line: its place in the file, from 1; end: where it ends there, in bytes.
    extras: the keys that do not say what to score. item: what to score, or error: what is wrong with the line.
    """

    index: int
    line: int
    end: int
    extras: dict[str, Any]
    item: Item | None = None
    error: str | None = None

    @property
    def cost(self) -> int:
        """What it takes of what is read ahead, in tokens."""
        return _RECORD + (self.item.tokens if self.item else 0)


class Records:
    """The records of a JSONL file (`-` is stdin), read and tokenised by a thread.

    make(content): the Item of a record; raises InputError. skip: how many records there are results of already. Raises
    InputError for a file that cannot be opened.
    """

    def __init__(self, path: str, make: Callable[[Any], Item], skip: int = 0) -> None:
        try:
            # Its thread reads it until the process ends.
            self._file: BinaryIO = sys.stdin.buffer if path == STDIO else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        self.name = "stdin" if path == STDIO else path
        self.nbytes = os.path.getsize(path) if os.path.isfile(path) else None
        self._make, self._skip = make, skip
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
        index = end = 0
        try:
            for line, text in enumerate(self._file, 1):
                end += len(text)
                if not text.strip():
                    continue
                if index >= self._skip:
                    record = self._record(index, line, end, text)
                    with self._taken:
                        self._taken.wait_for(lambda: self._ahead < _AHEAD)
                        self._ahead += record.cost
                    self._queue.put(record)
                elif index == self._skip - 1:
                    self.last_skipped = self._record(index, line, end, text)
                index += 1
            if index < self._skip:
                raise InputError(f"{self.name} has {index} records, but the output to continue has {self._skip}")
            self._queue.put(None)
        except BaseException as error:  # raised where the records are taken
            self._queue.put(error)

    def _record(self, index: int, line: int, end: int, text: bytes) -> Record:
        extras: dict[str, Any] = {}
        try:
            content = json.loads(text.decode("utf-8"), parse_constant=_refuse)
            if not isinstance(content, dict):
                raise InputError("a record must be a JSON object")
            extras = {key: value for key, value in content.items() if key not in ASKED}
            return Record(index, line, end, extras, self._make(content))
        except InputError as error:
            why = str(error)
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} is no UTF-8"
        except (ValueError, RecursionError) as error:
            why = f"no JSON: {error}"
        return Record(index, line, end, extras, error=why)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


class Lines:
    """Where results are written, each line whole: a file, or stdout (`-`). A context manager.

    resume: go on where the file ends; `done` lines are there already, of which `last` is the last; a line that was not
    written whole is cut off. Raises InputError for a file that is not to be overwritten, that another process writes,
    or that is no such output; KqprefillError where it cannot be written.
    """

    def __init__(self, path: str, resume: bool = False) -> None:
        self.done, self.name = 0, "stdout" if path == STDIO else path
        self.last: dict[str, Any] | None = None
        self._writing, self._signalled = False, 0
        self._handlers_before: dict[int, Any] = {}  # of signals, by their number
        if path == STDIO:
            self._handle = sys.stdout.fileno()
            return
        self._is_new = not os.path.lexists(path)
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not os.path.isfile(path):  # a pipe or a device
                return
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it") from None
        except OSError as error:
            raise KqprefillError(f"{path} cannot be written: {error.strerror}") from None
        if resume:
            self._find_end()
        elif os.fstat(self._handle).st_size:
            raise InputError(
                f"{path} holds something already: --resume continues an interrupted output; else remove it, "
                "or name another"
            )

    def _find_end(self) -> None:
        end = 0
        with open(os.dup(self._handle), "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    result = json.loads(line)
                    if result["index"] != self.done:
                        raise ValueError
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise InputError(
                        f"{self.name}: line {self.done + 1} is no result of record {self.done}; "
                        "this is no output to resume"
                    ) from None
                self.done, self.last, end = self.done + 1, result, end + len(line)
        os.ftruncate(self._handle, end)
        os.lseek(self._handle, end, os.SEEK_SET)

    def write(self, content: dict[str, Any]) -> None:
        """One line of JSON. An interrupt waits until it is whole; a second one does not."""
        try:
            data = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but UTF-8 cannot
            data = json.dumps(content, allow_nan=False).encode()
        data, self._writing = data + b"\n", True
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise KqprefillError(
                f"{self.name} cannot be written: {error.strerror}; --resume goes on from the last whole line"
            ) from None
        finally:
            self._writing = False
        if self._signalled:
            raise_signal(self._signalled)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals that end the run."""
        if self._writing and not self._signalled:
            self._signalled = number
        else:
            raise_signal(number)

    def __enter__(self) -> Lines:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers_before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        if self.name != "stdout":
            if self._is_new and os.path.isfile(self.name) and not os.fstat(self._handle).st_size and kind:
                os.unlink(self.name)  # a run that failed before its first line
            os.close(self._handle)


class Terminated(BaseException):
    """SIGTERM: what is unfinished is cleared away, and the process ends."""


def raise_signal(number: int, frame: FrameType | None = None) -> NoReturn:
    """What an interrupting signal becomes: KeyboardInterrupt, or Terminated."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
