"""Results as JSON lines, each written whole: a run that ends at any moment leaves what another can resume."""

from __future__ import annotations

from contextlib import suppress
import fcntl
import json
import os
import select
import signal
import stat
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from ..errors import InputError, KqprefillError
from ..terminal import json_line
from .interrupts import on_signals, raise_signal, reason
from .outputs import STDIO

_LOOK_MILLISECONDS = 100  # after which a pipe that takes nothing is asked again
_PATIENCE = 500  # milliseconds that its reader may take for a piece of a line once we are to end
_PIECE = select.PIPE_BUF  # bytes that a pipe takes at once where it takes any


class Lines:
    """Where results are written, each line whole: a file, or stdout (`-`). A context manager.

    resume: go on where the file ends; `done` lines are there already, `bad` of them errors, and `last` is the last; a
    line that was not written whole is cut off by the first that is written. written: lines of this run. Raises
    InputError for a file that is not to be overwritten, that another process writes, or that is no such output, which
    stays as it is; KqprefillError where it cannot be written.
    """

    def __init__(self, path: str, resume: bool = False) -> None:
        self.done = self.bad = self.written = 0
        self.name = "stdout" if path == STDIO else path
        self.last: dict[str, Any] | None = None
        self._writing, self._signalled = False, 0
        self._handlers_before: dict[int, Any] = {}  # of signals, by their number
        self._cut: int | None = None  # where a line begins that was not written whole
        self._is_new = path != STDIO and not os.path.lexists(path)
        self._handle = sys.stdout.fileno() if path == STDIO else self._open(path)
        self.is_file = stat.S_ISREG(os.fstat(self._handle).st_mode)
        self._is_terminal = os.isatty(self._handle)
        if path == STDIO or not self.is_file:
            return
        if resume:
            self._find_end()
        elif os.fstat(self._handle).st_size:
            raise InputError(
                f"{path} holds something already: --resume continues an interrupted output; else remove it, "
                "or name another"
            )

    def _open(self, path: str) -> int:
        try:
            if os.path.exists(path) and not os.path.isfile(path):  # a pipe, which waits for its reader, or a device
                return os.open(path, os.O_WRONLY)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it") from None
        except OSError as error:
            raise KqprefillError(f"{path} cannot be written: {error.strerror}") from None
        return handle

    def _find_end(self) -> None:
        end = 0
        with open(os.dup(self._handle), "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self.last = self._result(line)
                    self.done, self.bad, end = self.done + 1, self.bad + ("error" in self.last), end + len(line)
                    continue
                begin = b'{"index": %d, "' % self.done
                if not (line.startswith(begin) or begin.startswith(line)):
                    raise self._no_result()
                self._cut = end
        os.lseek(self._handle, end, os.SEEK_SET)

    def _result(self, line: bytes) -> dict[str, Any]:
        """A line as the result of the next record."""
        try:
            result = json.loads(line)
            counted = type(result["index"]) is int and result["index"] == self.done
            if counted and result.keys() & {"n_tokens", "choices", "error"}:
                return dict(result)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise self._no_result()

    def _no_result(self) -> InputError:
        return InputError(
            f"{self.name}: line {self.done + 1} is no result of record {self.done}; this is no output to resume"
        )

    def write(self, content: dict[str, Any]) -> None:
        """One line of JSON. An interrupt waits until it is whole; a second one does not, nor one where a reader
        stalls."""
        data, self._writing = json_line(content, self._is_terminal), True
        try:
            self._drop_cut()
            while data:
                data = data[self._write_some(data) :]
            self.written += 1
        except BrokenPipeError:
            if self.name == "stdout":
                raise
            raise KqprefillError(f"{self.name}: whoever read it has gone before all was written") from None
        except OSError as error:
            how = "; --resume goes on from the last whole line" if self.is_file and self.name != "stdout" else ""
            raise KqprefillError(f"{self.name} cannot be written: {reason(error)}{how}") from None
        finally:
            self._writing = False
        if self._signalled:
            raise_signal(self._signalled)

    def _write_some(self, data: bytes) -> int:
        """Write a part of data, and say how much. A file takes it at once; a pipe's reader may never take it."""
        if not self.is_file:
            waiting = select.poll()
            waiting.register(self._handle, select.POLLOUT)
            waited = 0
            while not waiting.poll(_LOOK_MILLISECONDS):
                waited = waited + _LOOK_MILLISECONDS if self._signalled else 0
                if waited > _PATIENCE:
                    raise_signal(self._signalled)
            data = data[:_PIECE]
        return os.write(self._handle, data)

    def _drop_cut(self) -> None:
        if self._cut is not None:
            os.ftruncate(self._handle, self._cut)
            self._cut = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals that end the run."""
        if self._writing and not self._signalled:
            self._signalled = number
        else:
            raise_signal(number)

    def __enter__(self) -> Lines:
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = on_signals(self.on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        if self.name == "stdout":
            return
        if kind is None:
            self._drop_cut()
        elif self._is_new and self.is_file and not os.fstat(self._handle).st_size:
            with suppress(FileNotFoundError):
                os.unlink(self.name)  # a run that failed before its first line
        try:
            os.close(self._handle)
        except OSError as failed:  # some file systems say only now that a disk is full
            if kind is None:
                raise KqprefillError(f"{self.name} cannot be written: {failed.strerror}") from None
