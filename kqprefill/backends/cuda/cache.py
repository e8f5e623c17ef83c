"""Where the keys and values of a kept cache live: on the device, or in host memory, a layer at a time on the device."""

from concurrent.futures import ThreadPoolExecutor
import mmap

import numpy as np

from ...errors import BackendError
from ..base import Cache
from .device import check, cuda_errors
from .memory import WINDOW, gib, host_memory, populate
from .tiles import padded_head

_THREADS = 8


def layer_bytes(config, capacity):
    """Of one layer's keys, or values: halves [tokens, head_count_kv, head_dim padded to 16]."""
    return 2 * capacity * config.head_count_kv * padded_head(config.head_dim)


class DeviceCache(Cache):
    """All layers' in device memory."""

    def __init__(self, gpu, config, capacity):
        super().__init__(capacity)
        self._gpu, self._half = gpu, layer_bytes(config, capacity)
        self._buffer = gpu.allocate(self.bytes_needed(config, capacity), f"a cache of {capacity} tokens")
        # Attention multiplies what lies past a sequence's end by zero, which must not be NaN.
        gpu.zero(int(self._buffer.handle), self._buffer.size)

    @staticmethod
    def bytes_needed(config, capacity):
        """Of device memory."""
        return 2 * layer_bytes(config, capacity) * config.block_count

    @property
    def device_bytes(self):
        return self._buffer.size if self._buffer is not None else 0

    def addresses(self, layer):
        """Device addresses of the layer's keys and values of token 0."""
        k = int(self._buffer.handle) + 2 * self._half * layer
        return k, k + self._half

    def begin_layer(self, layer, start, n):
        """Launch what has the layer's `start` cached tokens ready at its addresses; n more are to be written there."""

    def end_batch(self, start, n):
        """Wait until the last layer's are kept."""

    def close(self):
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
            self._buffer = None


class HostCache(DeviceCache):
    """All layers' in page-locked host memory, of which two are on the device: while one is computed, the one before is
    copied out and the next comes in."""

    def __init__(self, gpu, config, capacity):
        nbytes, most = DeviceCache.bytes_needed(config, capacity), host_memory() * 3 // 4
        if nbytes > most:
            raise BackendError(
                f"a cache of {capacity} tokens needs {gib(nbytes)} of host memory, as the GPU has no room for it; "
                f"at most {gib(most)} can be locked"
            )
        super().__init__(gpu, config, capacity)
        self._row = self._half // capacity
        self._layers = config.block_count
        self._stream = gpu.device.create_stream()
        self._ready = [gpu.device.create_event() for _ in range(2)]
        self._host = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._host.madvise(mmap.MADV_HUGEPAGE)  # locked four times as fast
        self._array = np.frombuffer(self._host, np.uint8).reshape(self._layers, 2, capacity, self._row)
        with ThreadPoolExecutor(_THREADS) as pool:  # page-locking would zero the pages alone
            for begin in range(0, len(self._host), WINDOW):
                address = self._array.ctypes.data + begin
                pool.submit(populate, address, min(WINDOW, len(self._host) - begin), write=True)
        with cuda_errors(f"page-locking {gib(self._array.nbytes)} of host memory for a cache of {capacity} tokens"):
            check(gpu.driver.cuMemHostRegister(self._array.ctypes.data, self._array.nbytes, 0))

    @staticmethod
    def bytes_needed(config, capacity):
        return 4 * layer_bytes(config, capacity)

    def addresses(self, layer):
        return super().addresses(layer % 2)

    def begin_layer(self, layer, start, n):
        if layer == 0:
            self._copy_in(0, start)
        else:
            self._copy_out(layer - 1, start, n)
        self._gpu.stream.wait(self._ready[layer % 2])
        if layer + 1 < self._layers:
            self._copy_in(layer + 1, start)

    def end_batch(self, start, n):
        self._copy_out(self._layers - 1, start, n)
        self._stream.sync()

    def _copy_in(self, layer, start):
        # The stream's order has this layer's room copied out of before it is written.
        if start:
            for address, kept in zip(self.addresses(layer), self._array[layer]):
                self._gpu.upload(address, kept[:start], self._stream)
        self._stream.record(self._ready[layer % 2])

    def _copy_out(self, layer, start, n):
        self._stream.wait(self._gpu.stream)  # the layer's attention has been launched
        for address, kept in zip(self.addresses(layer), self._array[layer]):
            part = kept[start : start + n]
            handle, driver = self._stream.handle, self._gpu.driver
            check(driver.cuMemcpyDtoHAsync(part.ctypes.data, address + start * self._row, part.nbytes, handle))

    def close(self):
        if self._buffer is not None:
            self._gpu.driver.cuStreamSynchronize(self._stream.handle)
            self._gpu.driver.cuMemHostUnregister(self._array.ctypes.data)
            self._array = None
            self._host.close()
            self._stream.close()
        super().close()
