"""Whether a folder and the files in it are the user's own, so that what is read from them may be run on the GPU."""

from __future__ import annotations

import os
from pathlib import Path
import stat

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def home_folder() -> Path | None:
    """The user's home: $HOME where it is absolute, else what the system knows; None where neither is."""
    import pwd

    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return Path(home) if os.path.isabs(home) else None


def why_not_own(folder: Path) -> str | None:
    """What keeps a folder's files from being believed, and what to do, in a line; None where nothing does.

    A folder that is not there yet is judged by the one that it would be made in. Never raises OSError.
    """
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        if os.path.lexists(folder):
            return f"{folder} is a link to nothing: remove it"
        return _why_not_made(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}; set KQPREFILL_CACHE_DIR to another folder"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is no folder; set KQPREFILL_CACHE_DIR to one"
    if status.st_uid != os.getuid():
        return f"{folder} belongs to another user; set KQPREFILL_CACHE_DIR to a folder of your own"
    if status.st_mode & _OTHERS_WRITE:
        return f"others may write {folder}: kqprefill cache --clear, and then chmod go-w {folder}"
    return _why_parents_open(folder)


def _why_not_made(folder: Path) -> str | None:
    parent = folder.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        return f"{parent} is no folder; set KQPREFILL_CACHE_DIR to another one"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} cannot be written; set KQPREFILL_CACHE_DIR to a folder that can"
    return _why_parents_open(parent / "made")


def _why_parents_open(folder: Path) -> str | None:
    """Whoever may write a folder, and not only add to it (the sticky bit), can replace what is in it."""
    try:
        real = Path(os.path.realpath(folder))
        for parent in real.parents:
            status = os.stat(parent)
            others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid))
            if others and not status.st_mode & stat.S_ISVTX:
                return f"others may replace what is in {parent}: chmod go-w {parent}, or set KQPREFILL_CACHE_DIR"
    except OSError as error:
        return f"{folder}: {error.strerror}; set KQPREFILL_CACHE_DIR to another folder"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is the user's alone, by the custom of many systems: the primary one, of the user's own name."""
    import grp
    import pwd

    try:
        known, user = grp.getgrgid(group), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group == user.pw_gid and known.gr_name == user.pw_name and set(known.gr_mem) <= {user.pw_name}


def read_own(path: Path) -> bytes | None:
    """A file's content, where it is the user's own: a regular file, not a link, that nobody else may write.

    None for any other. The folder is opened first and the file within it, so that neither can be swapped in between.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not _is_own(os.fstat(folder)):
            return None
        # Without waiting, as for a pipe that nobody writes to.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path.name, flags, dir_fd=folder), "rb") as file:
            status = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(status.st_mode) and _is_own(status) else None
    except OSError:
        return None
    finally:
        os.close(folder)


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE
