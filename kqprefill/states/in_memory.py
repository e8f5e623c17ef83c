"""A file in tmpfs, written by several threads at once.

Linux writes into a file one thread after another, so that bytes go through a mapping instead, which threads fill side
by side. What then takes the time is that the kernel finds pages for the file, which several threads do no faster than
one: a thread of its own has it do so ahead of what is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
import ctypes
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

_PIECE = 32 << 20  # bytes that are reserved at a time


class InMemoryFile:
    """Raises OSError where the file cannot be that long, or be mapped."""

    def __init__(self, handle: int, nbytes: int, order: Iterable[tuple[int, int]]) -> None:
        """handle: of a file that is open for reading and writing; nbytes: that it will have; order: of its parts, from
        a byte to before another, that which is written first."""
        os.ftruncate(handle, nbytes)
        self._mapped = mmap.mmap(handle, nbytes)
        self._address = np.frombuffer(self._mapped, np.uint8, 1).ctypes.data
        self._unmap = ctypes.CDLL(None).madvise
        self._thread = ThreadPoolExecutor(1, "reserve")
        numbers = (number for part in (*order, (0, nbytes)) for number in _pieces(*part))
        self._reserved: dict[int, Future[None]] = {}
        for number in dict.fromkeys(numbers):
            begin = number * _PIECE
            length = min(_PIECE, nbytes - begin)
            self._reserved[number] = self._thread.submit(os.posix_fallocate, handle, begin, length)

    def put(self, data: memoryview, offset: int) -> None:
        """Copy bytes to their place; from any thread. Raises OSError where the file system is full."""
        for number in _pieces(offset, offset + len(data)):
            self._reserved[number].result()  # or a file system that is full would end the process (SIGBUS)
        if not data:
            return
        np.frombuffer(self._mapped, np.uint8, len(data), offset)[:] = np.frombuffer(data, np.uint8)
        self._part_with(offset, offset + len(data))

    def _part_with(self, begin: int, end: int) -> None:
        """Unmap what lies in whole pages, while others copy: at the end a thread alone would take a while for all. (The
        file keeps it. ctypes lets others run meanwhile, where mmap.madvise does not.)"""
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            where, count = ctypes.c_void_p(self._address + begin), ctypes.c_size_t(end - begin)
            self._unmap(where, count, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """To be called once nothing is being put there."""
        self._thread.shutdown(cancel_futures=True)
        self._mapped.close()


def _pieces(begin: int, end: int) -> range:
    """The numbers of the pieces that bytes are in."""
    return range(begin // _PIECE, -(-end // _PIECE))


def in_memory(handle: int) -> bool:
    """Whether a file lies in tmpfs, and is open for reading too, as a mapping wants it."""
    device = os.fstat(handle).st_dev
    mounted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()]
    except OSError:  # no Linux
        return False
    # proc_pid_mountinfo(5): the third field is the device; the type comes after a field that is "-".
    if not any(fields[2] == mounted and fields[fields.index("-") + 1] == "tmpfs" for fields in mounts):
        return False
    return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
