"""What a run writes: whole or not at all, and never in the place of something that is still wanted.

Every file that a command writes goes through an `Outputs`, which knows what the same run reads and writes. It goes by
the file itself, not by its name, so that links and other spellings of a path make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import errno
import os
import shutil
import stat
import sys
import tempfile
from typing import Any, BinaryIO, TypeAlias, TypeVar

import click

from ..errors import InputError, KqprefillError
from .sources import from_home

STDIO = "-"

_Command = TypeVar("_Command", bound=Callable[..., Any])
_GGUF_MAGIC = b"GGUF"
# Which file it is: its device and number, and for one that is not there yet its folder's and its name.
_Identity: TypeAlias = tuple[int, int, str]


def force_option(command: _Command) -> _Command:
    """--force."""
    return click.option("--force", is_flag=True, help="Replace output files that exist (never a GGUF, nor an input).")(
        command
    )


class Outputs:
    """The files that one run reads and writes.

    An output never takes the place of an input, of a GGUF, or of another output of the run; another file that exists is
    replaced where `force` is given, and keeps its mode.
    """

    def __init__(self, force: bool = False) -> None:
        self._force = force
        self._read: dict[_Identity, str] = {}
        self._written: dict[_Identity, str] = {}

    def reads(self, path: str, what: str) -> None:
        """Note an input (`-`: stdin); what: as messages call it. One that is not there is left to whoever opens it."""
        if path == STDIO:
            self._note_stream(0, self._read, "stdin")
            return
        with suppress(OSError):
            self._read.setdefault(_identity(os.stat(path)), what)

    def reads_text(self, text: str | None, option: str) -> None:
        """Note what an option such as --prompt reads: `@FILE`, or `-`; other texts are no files."""
        if text is not None and (text == STDIO or text.startswith("@")):
            self.reads(from_home(text.removeprefix("@")), f"the file of {option}")

    def writes_stdout(self) -> None:
        """Note that results go to stdout. Raises InputError where that is a file that is read."""
        self._note_stream(1, self._written, "stdout")
        for identity in self._written.keys() & self._read.keys():
            raise InputError(f"stdout is {self._read[identity]}, which is read; write to another file")

    def claim(self, path: str, option: str, may_exist: bool = False) -> None:
        """Say that `path` will be written, as `option` asks; before any output is opened.

        may_exist: the command has a rule of its own for a file that is there. Raises InputError where it must not be.
        """
        if path == STDIO:
            self.writes_stdout()
            return
        if not path:
            raise InputError(f"{option}: the file name is empty")
        try:
            status = os.stat(path)
        except OSError:
            status = None
        identities = {_place(path)} if status is None else {_identity(status), _place(path)}
        for identity in identities:
            if identity in self._read:
                raise InputError(f"{option} {path}: this is {self._read[identity]}, which is read; name another file")
            if identity in self._written:
                other = self._written[identity]
                raise InputError(f"{option} {path}: {other} goes to the same file; name another")
        if status is not None and stat.S_ISREG(status.st_mode):
            _refuse_gguf(path, option)
            if not (self._force or may_exist):
                raise InputError(f"{option} {path}: it exists; --force replaces it, or name another file")
        if status is None or not stat.S_ISCHR(status.st_mode):  # the likes of /dev/null take anything
            self._written.update(dict.fromkeys(identities, option))

    @staticmethod
    def try_folder(path: str, option: str) -> None:
        """Raise KqprefillError where `path`, which is opened only after long work, could not be written now."""
        if path == STDIO or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)):
            return
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
                pass
        except OSError as error:
            raise _unwritable(option, path, error) from None

    @contextmanager
    def open(self, path: str, option: str, again: bool = False) -> Iterator[BinaryIO]:
        """A binary file to write `path` (`-`: stdout) through, which has been claimed: renamed into place at the end,
        or removed if the work fails.

        A pipe or a device is written as it is, and a symbolic link leads to the file that is replaced. again:
        a file that the run may have written before, or gone on from. Raises KqprefillError where it cannot be written.
        """
        if path == STDIO:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
            return
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                with open(path, "wb") as file:  # a folder says so itself
                    yield file
                return
            target = os.path.realpath(path)
            handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".kqprefill-", suffix=".tmp")
            os.close(handle)
            try:
                with open(temporary, "wb") as file:  # by name, which whoever writes may need
                    yield file
                self._place(temporary, target, self._force or again)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
        except OSError as error:
            raise _unwritable(option, path, error) from None

    def _place(self, temporary: str, target: str, replace: bool) -> None:
        """Give a file that is written its name, and the mode (where possible the owner) of what it replaces."""
        try:
            before = os.stat(target)
        except FileNotFoundError:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        else:
            with suppress(PermissionError):
                os.chown(temporary, before.st_uid, before.st_gid)
            os.chmod(temporary, stat.S_IMODE(before.st_mode))
        if not replace:  # what has come to be there since is nobody's to replace
            try:
                os.link(temporary, target)
                return
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.replace(temporary, target)

    @staticmethod
    def _note_stream(number: int, into: dict[_Identity, str], what: str) -> None:
        """Note what the shell has connected stdin or stdout with, where that is a file (or, to write to, a pipe)."""
        with suppress(OSError):
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode) or (number == 1 and stat.S_ISFIFO(status.st_mode)):
                into.setdefault(_identity(status), what)


def free_room(path: str) -> int | None:
    """Bytes free where a file will be; None where that means nothing: a pipe, a device, a folder that is not there."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or (os.path.exists(path) and not os.path.isfile(path)):
        return None
    return shutil.disk_usage(folder).free


def _unwritable(option: str, path: str, error: OSError) -> KqprefillError:
    return KqprefillError(f"{option} {path} cannot be written: {error.strerror or error}")


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, ""


def _place(path: str) -> _Identity:
    """Where a file will be that is not there yet."""
    target = os.path.realpath(path)
    with suppress(OSError):
        folder = os.stat(os.path.dirname(target))
        return folder.st_dev, folder.st_ino, os.path.basename(target)
    return -1, -1, target


def _refuse_gguf(path: str, option: str) -> None:
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
            raise InputError(
                f"{option} {path}: this is a GGUF, which is never replaced; remove it first, or name another file"
            )
