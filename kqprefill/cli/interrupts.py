"""How a run ends before its end: signals, and streams that were closed before it began."""

from __future__ import annotations

from collections.abc import Callable
import errno
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal: what is unfinished is cleared away, and the process ends with 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def raise_signal(number: int, frame: FrameType | None = None) -> NoReturn:
    """What a signal becomes."""
    raise Interrupted(number)


def on_signals(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Have a handler called for the signals that end a run, unless whoever started us has them ignored (nohup). Where
    they were blocked for us they no longer are: they would wait until the end, and a server has none.

    Returns the handlers before, by signal.
    """
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
    return {number: signal.signal(number, handler) for number in heard}


def reason(error: OSError) -> str:
    """What failed, for people."""
    closed = error.errno == errno.EBADF  # what is left of a stream that was closed before we began
    return "it is closed" if closed else error.strerror or str(error)


def mend_streams() -> None:
    """Make something of streams that were closed (`<&-`), so that no file that is opened later takes their numbers.

    Reading stdin then fails, and so does writing to stdout: what would be lost is an error. What goes to stderr is for
    people, and can be lost.
    """
    for number, name, flags in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is not None:
            continue
        handle = os.open(os.devnull, flags)
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
