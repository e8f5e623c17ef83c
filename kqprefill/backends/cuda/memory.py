"""Device memory that is reused from call to call, and copies from host memory at the bus's rate."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from .device import check, cuda_errors

ALIGNMENT = 256  # of every tensor in device memory
WINDOW = 64 << 20  # bytes of host memory that are locked at a time


def aligned(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def gib(nbytes):
    """For people."""
    return f"{nbytes / 2**30:.2f} GiB"


def host_memory(cgroups="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Bytes of main memory that this process may use: the machine's, or what its control groups (v2) allow."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        group = Path(cgroups, Path(membership).read_text(encoding="utf-8").rpartition("0::/")[2].strip())
        files = [folder / "memory.max" for folder in (group, *group.parents)]
        found = [file.read_text().strip() for file in files if file.exists()]
        limits += [int(text) for text in found if text.isdigit()]  # else "max"
    except OSError:  # none
        pass
    return min(limits)


class Workspace:
    """Named work buffers. Each grows to the largest size asked for and is then reused; new memory is zeroed.

    generation: changes whenever a buffer has moved, so that whoever keeps addresses can tell.
    """

    def __init__(self, gpu):
        self._gpu, self._buffers, self.generation = gpu, {}, 0

    def get(self, name, nbytes):
        """Address of at least nbytes; the same for the same name as long as it need not grow."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            if buffer is not None:
                buffer.close(self._gpu.stream)
                del self._buffers[name]
                self.generation += 1
            buffer = self._buffers[name] = self._gpu.allocate(nbytes, f"work buffer {name!r}")
            self._gpu.zero(int(buffer.handle), buffer.size)
        return int(buffer.handle)

    def close(self):
        for buffer in self._buffers.values():
            buffer.close(self._gpu.stream)
        self._buffers.clear()


class Downloads:
    """Copies to the host that are waited for later, through two page-locked buffers in turn."""

    def __init__(self, gpu):
        self._gpu, self._buffers, self._next = gpu, [(None, 0), (None, 0)], 0

    def start(self, array, address):
        """Have what a device address holds, once all launched so far has run, copied: a function that waits, fills the array
        and returns it. To be called before the next download but one is started."""
        which, self._next = self._next, 1 - self._next
        driver, (host, room) = self._gpu.driver, self._buffers[which]
        if room < array.nbytes:
            self._free(which)
            host = check(driver.cuMemHostAlloc(array.nbytes, 0))
            self._buffers[which] = host, array.nbytes
        check(driver.cuMemcpyDtoHAsync(int(host), address, array.nbytes, self._gpu.stream.handle))
        landed = self._gpu.stream.record()

        def wait():
            landed.sync()
            ctypes.memmove(array.ctypes.data, int(host), array.nbytes)
            return array

        return wait

    def _free(self, which):
        host, room = self._buffers[which]
        if room:
            self._gpu.driver.cuMemFreeHost(host)
        self._buffers[which] = None, 0

    def close(self):
        """Free the buffers, once nothing is copied into them any more."""
        self._gpu.driver.cuStreamSynchronize(self._gpu.stream.handle)
        for which in (0, 1):
            self._free(which)


class HostPages:
    """Locks host memory where it lies, a window at a time, so that the copy engine reads it at the bus's rate.

    Locking runs at 39 GB/s for a file in the page cache and makes no copy; a copy from pages that are not locked runs at a
    tenth of the bus's 55 GB/s (an H100). About `keep` bytes stay locked: those used last.
    """

    AHEAD, THREADS = 16, 4  # windows read ahead of their use, and threads that do it

    def __init__(self, gpu, keep):
        self._gpu, self._most = gpu, max(2, keep // WINDOW)
        self._windows = OrderedDict()  # window: event of its last use, or None where it cannot be locked
        self._read, self._leaving = {}, {}  # window: future of its being read, and unlocked
        self._threads = ThreadPoolExecutor(self.THREADS, "pages", initializer=gpu.device.set_current)

    def pieces(self, array):
        """(window, uint8 array) one after another: a contiguous array's bytes, cut where windows end."""
        flat, start = array.reshape(-1).view(np.uint8), array.ctypes.data
        at = 0
        while at < flat.size:
            end = min(flat.size, WINDOW - (start + at) % WINDOW + at)
            yield _Window(flat, (start + at) // WINDOW * WINDOW, WINDOW), flat[at:end]
            at = end

    def read_ahead(self, array):
        """Have threads bring a mapped file's pages from disk. Returns False once enough is under way."""
        for window, _ in self.pieces(array):
            if not window.lockable or window in self._windows or window in self._read:
                continue
            if len(self._read) >= self.AHEAD:
                return False
            self._read[window] = self._threads.submit(populate, window.begin, window.end - window.begin)
        return True

    def lock(self, window):
        """Whether the window is locked now. It stays so until `used`, and a while longer."""
        if not window.lockable:
            return False
        if window not in self._windows:
            for under_way in (self._read, self._leaving):
                if window in under_way:
                    under_way.pop(window).result()
            if len(self._windows) >= self._most:
                oldest, event = self._windows.popitem(last=False)
                self._leaving[oldest] = self._threads.submit(self._unlock, oldest, event)
            flags = 0 if window.writeable else self._gpu.driver.CU_MEMHOSTREGISTER_READ_ONLY
            (status,) = self._gpu.driver.cuMemHostRegister(window.begin, window.end - window.begin, flags)
            self._windows[window] = self._gpu.device.create_event() if status == 0 else None
        self._windows.move_to_end(window)
        return self._windows[window] is not None

    def used(self, window, stream):
        """What was launched on the stream so far is what reads the window."""
        stream.record(self._windows[window])

    def _unlock(self, window, event):
        if event is not None:
            event.sync()
            self._gpu.driver.cuMemHostUnregister(window.begin)

    def close(self):
        """Unlock everything, once nothing launched so far reads it."""
        for future in self._read.values():
            future.cancel()
        for window, event in self._windows.items():
            self._threads.submit(self._unlock, window, event)
        self._threads.shutdown()
        self._windows.clear()


class _Window:
    """The part of a window of addresses that an array's mapping covers. Other memory shares pages with who knows what, and
    is not `lockable`."""

    def __init__(self, array, address, length):
        while isinstance(array.base, np.ndarray):
            array = array.base
        first, owner = array.ctypes.data, array.base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        self.lockable, self.writeable = isinstance(owner, mmap.mmap), array.flags.writeable
        self.begin = max(address, first)
        self.end = min(address + length, -(-(first + array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)

    def __eq__(self, other):
        return (self.begin, self.end) == (other.begin, other.end)

    def __hash__(self):
        return hash(self.begin)


_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14


def populate(address, nbytes, write=False):
    """Map pages, reading or zeroing them first; where the kernel cannot, locking does it, one after another."""
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)


class Uploader:
    """Copies host arrays to the device on `stream`: from pages locked in place or, where that cannot be, through a ring of
    page-locked buffers that several threads fill."""

    SLOT_BYTES, SLOTS, THREADS = 4 << 20, 16, 8  # page-locking takes 0.6 ms a megabyte of new memory

    def __init__(self, gpu, stream, keep):
        """keep: bytes of host memory that may stay locked."""
        self._gpu, self._stream, self._pages = gpu, stream, HostPages(gpu, keep)
        self._base = None  # of the ring, made when first needed

    def read_ahead(self, array):
        return self._pages.read_ahead(array)

    def copy(self, source, address):
        """Copy a contiguous host array, left alone until the stream has got there, to a device address."""
        for window, piece in self._pages.pieces(source):
            if self._pages.lock(window):
                self._gpu.upload(address, piece, self._stream)
                self._pages.used(window, self._stream)
            else:
                self._copy_through_ring(piece, address)
            address += piece.size

    def _copy_through_ring(self, source, address):
        if self._base is None:
            self._make_ring()
        pieces = [source[at : at + self.SLOT_BYTES] for at in range(0, source.size, self.SLOT_BYTES)]
        for first in range(0, len(pieces), self.SLOTS):
            filled = [
                self._pool.submit(self._fill, i, piece) for i, piece in enumerate(pieces[first : first + self.SLOTS])
            ]
            for slot, future in enumerate(filled):
                self._gpu.upload(address, future.result(), self._stream)
                self._stream.record(self._events[slot])
                address += future.result().size

    def _fill(self, slot, piece):
        self._events[slot].sync()  # what was here before has been copied
        part = self._slots[slot][: piece.size]
        np.copyto(part, piece)
        return part

    def _make_ring(self):
        nbytes = self.SLOT_BYTES * self.SLOTS
        with cuda_errors("allocating page-locked staging memory"):
            self._base = check(self._gpu.driver.cuMemHostAlloc(nbytes, 0))
        ring = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(self._base)))
        self._slots = list(ring.reshape(self.SLOTS, self.SLOT_BYTES))
        self._events = [self._gpu.device.create_event() for _ in self._slots]
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="upload")

    def close(self):
        """Free the ring and unlock the pages, once nothing reads them any more."""
        self._gpu.driver.cuStreamSynchronize(self._stream.handle)  # its errors were, or will be, someone else's to tell
        self._pages.close()
        if self._base is not None:
            self._pool.shutdown()
            self._slots = None
            self._gpu.driver.cuMemFreeHost(self._base)
            self._base = None
