"""Host memory that the GPU's copy engine reads: pages locked where they lie, and copies from there to the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.gpu import Gpu, cuda_errors

WINDOW = 64 << 20  # bytes of host memory that are locked at a time


class HostPages:
    """Locks host memory where it lies, a window at a time, so that the copy engine reads it at the bus's rate.

    Locking runs at 39 GB/s for a file in the page cache and makes no copy; a copy from pages that are not locked runs
    at a tenth of the bus's 55 GB/s (an H100). About `keep` bytes stay locked: those used last.
    """

    AHEAD, THREADS = 16, 4  # windows read ahead of their use, and threads that do it

    def __init__(self, gpu: Gpu, keep: int) -> None:
        self._gpu, self._most = gpu, max(2, keep // WINDOW)
        # Each locked window with the event of its last use, or None where it cannot be locked; the one used last comes
        # last.
        self._windows: OrderedDict[_Window, Any] = OrderedDict()
        self._used: dict[_Window, Any] = {}  # those whose last use has no event yet: the stream that reads them
        self._read: dict[_Window, Future[None]] = {}  # those that threads are reading
        self._leaving: dict[_Window, Future[None]] = {}  # those that threads are unlocking
        self._threads = ThreadPoolExecutor(self.THREADS, "pages", initializer=gpu.device.set_current)

    def pieces(self, array: NDArray[Any]) -> Iterator[tuple[_Window, NDArray[np.uint8]]]:
        """(window, uint8 array) one after another: a contiguous array's bytes, cut where windows end."""
        flat, start = array.reshape(-1).view(np.uint8), array.ctypes.data
        at = 0
        while at < flat.size:
            end = min(flat.size, WINDOW - (start + at) % WINDOW + at)
            yield _Window(flat, (start + at) // WINDOW * WINDOW, WINDOW), flat[at:end]
            at = end

    def read_ahead(self, array: NDArray[Any]) -> bool:
        """Have threads bring a mapped file's pages from disk. Returns False once enough is under way."""
        for window, _ in self.pieces(array):
            if not window.lockable or window in self._windows or window in self._read:
                continue
            if len(self._read) >= self.AHEAD:
                return False
            self._read[window] = self._threads.submit(populate, window.begin, window.end - window.begin)
        return True

    def lock(self, window: _Window) -> bool:
        """Whether the window is locked now. It stays so until `used`, and a while longer."""
        if not window.lockable:
            return False
        if window not in self._windows:
            for under_way in (self._read, self._leaving):
                if window in under_way:
                    under_way.pop(window).result()
            if len(self._windows) >= self._most:
                oldest, event = self._windows.popitem(last=False)
                if oldest in self._used:
                    self._used.pop(oldest).record(event)
                self._leaving[oldest] = self._threads.submit(self._unlock, oldest, event)
            status = self._gpu.lock(window.begin, window.end - window.begin, read_only=not window.writeable)
            self._windows[window] = self._gpu.device.create_event() if status == 0 else None
        self._windows.move_to_end(window)
        return self._windows[window] is not None

    def used(self, window: _Window, stream: Any) -> None:
        """What was launched on the stream so far is what reads the window; `mark_uses` is to follow."""
        self._used[window] = stream

    def mark_uses(self) -> None:
        """Record the windows' events, all at once: between copies each would keep the copy engine waiting."""
        for window, stream in self._used.items():
            stream.record(self._windows[window])
        self._used.clear()

    def _unlock(self, window: _Window, event: Any) -> None:
        if event is not None:
            event.sync()
            self._gpu.driver.cuMemHostUnregister(window.begin)

    def close(self) -> None:
        """Unlock everything, once nothing launched so far reads it."""
        self._used.clear()
        for future in self._read.values():
            future.cancel()
        for window, event in self._windows.items():
            self._threads.submit(self._unlock, window, event)
        self._threads.shutdown()
        self._windows.clear()


class _Window:
    """The part of a window of addresses that an array's mapping covers.

    Memory that is no mapping shares its pages with who knows what, and is not `lockable`. A mapping stays as long as
    the window: new memory that the system puts where pages are still locked cannot be locked.
    """

    def __init__(self, array: NDArray[Any], address: int, length: int) -> None:
        while isinstance(array.base, np.ndarray):
            array = array.base
        first, owner = array.ctypes.data, array.base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        self.lockable, self.writeable = isinstance(owner, mmap.mmap), array.flags.writeable
        self._mapping = owner
        self.begin = max(address, first)
        self.end = min(address + length, -(-(first + array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Window) and (self.begin, self.end) == (other.begin, other.end)

    def __hash__(self) -> int:
        return hash(self.begin)


_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14


def populate(address: int, nbytes: int, write: bool = False) -> None:
    """Map pages, reading or zeroing them first; where the kernel cannot, locking does it, one after another."""
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)


class Uploader:
    """Copies host arrays to the device on `stream`: from pages locked in place or, where that cannot be, through a ring
    of page-locked buffers that several threads fill."""

    SLOT_BYTES, SLOTS, THREADS = 4 << 20, 16, 8  # page-locking takes 0.6 ms a megabyte of new memory

    def __init__(self, gpu: Gpu, stream: Any, keep: int) -> None:
        """keep: bytes of host memory that may stay locked."""
        self._gpu, self._stream, self._pages = gpu, stream, HostPages(gpu, keep)
        self._ring: _Ring | None = None  # made when first needed

    def read_ahead(self, array: NDArray[Any]) -> bool:
        """As HostPages.read_ahead."""
        return self._pages.read_ahead(array)

    def copy(self, source: NDArray[Any], address: int) -> None:
        """Copy a contiguous host array, left alone until the stream has got there, to a device address."""
        for window, piece in self._pages.pieces(source):
            if self._pages.lock(window):
                self._gpu.upload(address, piece, self._stream)
                self._pages.used(window, self._stream)
            else:
                if self._ring is None:
                    self._ring = _Ring(self._gpu, self._stream, self.SLOTS, self.SLOT_BYTES, self.THREADS)
                self._ring.copy(piece, address)
            address += piece.size

    def end_copies(self) -> None:
        """To be called after the last of several copies: what they read is unlocked once they have been made."""
        self._pages.mark_uses()

    def close(self) -> None:
        """Free the ring and unlock the pages, once nothing reads them any more."""
        self._gpu.driver.cuStreamSynchronize(self._stream.handle)  # its errors were, or will be, someone else's to tell
        self._pages.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None


class _Ring:
    """Page-locked buffers, filled by threads and copied to the device one after another."""

    def __init__(self, gpu: Gpu, stream: Any, slots: int, slot_bytes: int, threads: int) -> None:
        self._gpu, self._stream, self._slot_bytes = gpu, stream, slot_bytes
        with cuda_errors("allocating page-locked staging memory"):
            self._base = gpu.locked(slots * slot_bytes)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (slots * slot_bytes)).from_address(int(self._base)))
        self._slots = list(memory.reshape(slots, slot_bytes))
        self._events = [gpu.device.create_event() for _ in self._slots]
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="upload")

    def copy(self, source: NDArray[np.uint8], address: int) -> None:
        """Copy host bytes to a device address."""
        pieces = [source[at : at + self._slot_bytes] for at in range(0, source.size, self._slot_bytes)]
        for first in range(0, len(pieces), len(self._slots)):
            some = pieces[first : first + len(self._slots)]
            filled = [self._threads.submit(self._fill, slot, piece) for slot, piece in enumerate(some)]
            for event, future in zip(self._events, filled):
                self._gpu.upload(address, future.result(), self._stream)
                self._stream.record(event)
                address += future.result().size

    def _fill(self, slot: int, piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self._events[slot].sync()  # what was here before has been copied
        part = self._slots[slot][: piece.size]
        np.copyto(part, piece)
        return part

    def close(self) -> None:
        """Free the buffers, once nothing is copied from them any more."""
        self._threads.shutdown()
        self._slots.clear()
        self._gpu.driver.cuMemFreeHost(self._base)
