"""Device memory: work buffers that are reused from call to call, and uploads through page-locked staging."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
import ctypes
from functools import partial

import numpy as np

from .device import check, cuda_errors

ALIGNMENT = 256  # of every tensor in device memory


def aligned(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


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


class Uploader:
    """Copies host arrays to the device through a ring of page-locked buffers that several threads fill.

    A page-locked copy runs at the bus's rate, a pageable one at a tenth of it (measured: 55 and 6 GB/s on an H100), so
    the host's copying must be spread over threads to keep up. Copies and other work reach the stream in the order asked.
    """

    SLOT_BYTES, MOST_SLOTS, THREADS = 4 << 20, 16, 8  # page-locking takes 0.4 ms a megabyte

    def __init__(self, gpu, nbytes):
        """nbytes: of all that will be copied; a small model needs no large ring."""
        self._gpu, driver = gpu, gpu.driver
        count = max(2, min(self.MOST_SLOTS, -(-nbytes // self.SLOT_BYTES)))
        with cuda_errors("allocating page-locked staging memory"):
            self._base = check(driver.cuMemHostAlloc(self.SLOT_BYTES * count, 0))
        ring = np.ctypeslib.as_array((ctypes.c_uint8 * (self.SLOT_BYTES * count)).from_address(int(self._base)))
        self._slots = list(ring.reshape(count, self.SLOT_BYTES))
        self._events = [gpu.device.create_event() for _ in self._slots]
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="upload")
        self._pending, self._pieces = deque(), 0

    def copy(self, source, address):
        """Copy a host array, left alone until `close`, to a device address."""
        flat = np.ascontiguousarray(source).reshape(-1)
        for at in range(0, flat.size, self.SLOT_BYTES):
            piece, slot = flat[at : at + self.SLOT_BYTES], self._pieces % len(self._slots)
            self._pieces += 1
            self._events[slot].sync()  # what was here before has been copied
            filled = self._pool.submit(np.copyto, self._slots[slot][: piece.size], piece)
            self._push(filled, partial(self._send, slot, piece.size, address + at))

    def then(self, action):
        """Call `action`, which launches something, after the copies asked for so far."""
        self._push(None, action)

    def _push(self, filled, action):
        self._pending.append((filled, action))
        # Fewer than the slots, so that a slot asked for again has been sent.
        if len(self._pending) > len(self._slots) // 2:
            self._pop()

    def _pop(self):
        filled, action = self._pending.popleft()
        if filled is not None:
            filled.result()
        action()

    def _send(self, slot, nbytes, address):
        self._gpu.upload(address, self._slots[slot][:nbytes])
        self._gpu.stream.record(self._events[slot])

    def finish(self):
        """Send all that is pending, and wait until it has been copied."""
        while self._pending:
            self._pop()
        self._gpu.stream.sync()

    def close(self):
        """Free the ring, once nothing reads it any more."""
        self._pool.shutdown()
        # An error was, or will be, someone else's to tell.
        self._gpu.driver.cuStreamSynchronize(self._gpu.stream.handle)
        self._slots = None
        self._gpu.driver.cuMemFreeHost(self._base)
