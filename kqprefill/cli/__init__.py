"""The command line: one click command a file. Heavy imports (NumPy, CUDA, rich) wait until a command needs them.

This module imports next to nothing itself, so that an interrupt finds `main` at work however early it comes.
"""

from __future__ import annotations

from contextlib import suppress
import os
import sys

from .interrupts import Interrupted, mend_streams, on_signals, raise_signal, reason


def main() -> None:
    """Entry point. Exit status: 0; 1 for an error; 2 for wrong usage; 3 where `score` has skipped bad records; 130 when
    interrupted (SIGINT), 143 when ended (SIGTERM)."""
    status = 1
    try:
        try:
            on_signals(raise_signal)
            mend_streams()
            if sys.platform == "win32":
                from ..errors import KqprefillError

                raise KqprefillError("Windows is not supported; use WSL2, which is Linux and has the GPU")
            from .commands import cli

            status = cli(standalone_mode=False) or 0
            sys.stdout.flush()
        except Interrupted as ended:
            status = ended.status
        except BaseException as error:
            status = _status_of(error)
        sys.stderr.flush()
    finally:  # a second interrupt too
        # All is written: taking Python and the driver apart piece by piece takes as long as a short prompt.
        os._exit(status)


def _status_of(error: BaseException) -> int:
    """Say on stderr what went wrong, in a line, and give the exit status."""
    import click

    from ..errors import InputError, KqprefillError
    from .common import say

    asked = "-v" in sys.argv or "--verbose" in sys.argv
    if isinstance(error, click.ClickException):
        with suppress(OSError):  # stderr cannot be written
            error.show()
        return error.exit_code
    if isinstance(error, SystemExit):  # click: whoever read our output has gone; there is nothing more to say
        return error.code if isinstance(error.code, int) else 1
    if asked and not isinstance(error, OSError):
        import traceback

        traceback.print_exception(error)
    elif isinstance(error, KqprefillError):
        say(str(error))
    elif isinstance(error, MemoryError):
        say("out of memory; a shorter prompt, or logits of the last position only, need less")
    elif isinstance(error, OSError):
        if not isinstance(error, BrokenPipeError):
            say(f"{error.filename or 'stdout'}: {reason(error)}")
    else:
        say(f"an error in kqprefill itself: {type(error).__name__}: {error}; --verbose shows where, please report it")
    return 2 if isinstance(error, InputError) else 1
