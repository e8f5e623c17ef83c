"""Device memory: work buffers that are reused from call to call, and uploads through page-locked staging."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
import ctypes

import numpy as np

from .device import check, cuda_errors

ALIGNMENT = 256  # of every tensor in device memory


def aligned(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Workspace:
    """Named work buffers. Each grows to the largest size asked for and is then reused; new memory is zeroed."""

    def __init__(self, gpu):
        self._gpu, self._buffers = gpu, {}

    def get(self, name, nbytes):
        """Address of at least nbytes; the same for the same name as long as it need not grow."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            if buffer is not None:
                buffer.close(self._gpu.stream)
                del self._buffers[name]
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
    the host's copying must be spread over threads to keep up.
    """

    SLOT_BYTES, SLOTS, THREADS = 8 << 20, 16, 8

    def __init__(self, gpu):
        self._gpu, driver = gpu, gpu.driver
        with cuda_errors("allocating page-locked staging memory"):
            self._base = check(driver.cuMemHostAlloc(self.SLOT_BYTES * self.SLOTS, 0))
        ring = np.ctypeslib.as_array((ctypes.c_uint8 * (self.SLOT_BYTES * self.SLOTS)).from_address(int(self._base)))
        self._slots = list(ring.reshape(self.SLOTS, self.SLOT_BYTES))
        self._events = [gpu.device.create_event() for _ in self._slots]
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="upload")

    def copy(self, items, progress):
        """items: (uint8 array, device address) pairs; progress(bytes done) after each piece."""
        pieces = (
            (source[at : at + self.SLOT_BYTES], address + at)
            for source, address in ((np.ascontiguousarray(s).reshape(-1), a) for s, a in items)
            for at in range(0, source.size, self.SLOT_BYTES)
        )
        filling, done = deque(), 0

        def send():
            nonlocal done
            slot, future, size, address = filling.popleft()
            future.result()
            self._gpu.upload(address, self._slots[slot][:size])
            self._gpu.stream.record(self._events[slot])
            done += size
            progress(done)

        for number, (source, address) in enumerate(pieces):
            slot = number % self.SLOTS
            if len(filling) == self.SLOTS:
                send()
            self._events[slot].sync()  # the slot's last copy has left it
            future = self._pool.submit(np.copyto, self._slots[slot][: source.size], source)
            filling.append((slot, future, source.size, address))
        while filling:
            send()

    def close(self):
        self._pool.shutdown()
        self._gpu.stream.sync()
        self._slots = None
        check(self._gpu.driver.cuMemFreeHost(self._base))
