"""JSON lines: records read ahead by a thread, results written line by line, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
import os
import queue
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

from ..corpus.inputs import LONGEST_LINE, is_table
from ..corpus.records import ASKED, BOM, OURS, Reader, Record
from ..errors import InputError, KqprefillError
from .interrupts import reason
from .outputs import STDIO
from .sources import from_home

if TYPE_CHECKING:
    from ..engine.scoring import Item

_AHEAD = 1 << 16  # tokens that are read before they are needed, about: some batches
_LINGER = 0.05  # seconds to wait for more, before what there is runs in a smaller batch
_LOOK_SECONDS = 0.5  # after which a signal is heard that came just before the wait: the system wakes nobody for it


def check_inputs(paths: Sequence[str], advice: str = "") -> list[str]:
    """The files of records as they will be opened (`-`: stdin). Raises KqprefillError for one that cannot be read,
    before anything else is done; InputError for stdin twice. advice: what to do where one is no file of lines."""
    if paths.count(STDIO) > 1:
        raise InputError("stdin (`-`) is given twice; it can be read once")
    found = [path if path == STDIO else from_home(path) for path in paths]
    for path in found:
        if path == STDIO:
            continue
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise KqprefillError(f"{path}: a folder, where a file of JSON lines is wanted{advice}")
            if is_table(path):
                raise KqprefillError(f"{path}: Parquet, where a file of JSON lines is wanted{advice}")
            if not os.access(path, os.R_OK):
                raise KqprefillError(f"{path}: it may not be read")
        except OSError as error:
            raise KqprefillError(f"{path}: {error.strerror}") from None
    return found


class Records:
    """The records of JSONL files (`-` is stdin), one after another, read and tokenised by a thread.

    skip: how many records there are results of already. The others: as Reader has them. Where a file cannot be read,
    taking its records raises KqprefillError.
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
        self._reader, self._skip = Reader(make, keep_as, asked, ours, plain), skip
        # It waits within one call of C. Within queue.Queue's waiting, an interrupt may become "release unlocked lock".
        self._queue: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
        self._ahead, self._taken = 0, threading.Condition()
        self.last_skipped: Record | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[Record | None]:
        """Records, and None where no more are there yet."""
        waiting = False
        while True:
            try:
                read = self._queue.get(timeout=_LINGER if waiting else _LOOK_SECONDS)
            except queue.Empty:
                if waiting:
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
                    record = self._reader.of_line(index, name, line, end, text)
                    with self._taken:
                        self._taken.wait_for(lambda: self._ahead < _AHEAD)
                        self._ahead += record.cost
                    self._queue.put(record)
                elif index == self._skip - 1:
                    self.last_skipped = self._reader.of_line(index, name, line, end, text)
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
                    yield name, number, end, text.removeprefix(BOM) if number == 1 else text
            except OSError as error:
                raise KqprefillError(f"{name}: {reason(error)}") from None
