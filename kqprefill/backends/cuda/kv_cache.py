"""Where the layers' states of a kept sequence live: on the device, or in host memory with two layers on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import mmap

import numpy as np

from ...core import KeysValues, LayerState
from ...errors import BackendError
from ..base import Cache
from ..budget import gib, host_memory
from .attention_kernels import padded_head
from .device.arrays import FLOAT16, DeviceArray
from .device.gpu import Gpu, check, cuda_errors
from .weights.host_pages import WINDOW, populate

_THREADS = 8


def token_shape(state: LayerState) -> tuple[int, int]:
    """What one token's keys, or values, take in a layer's state: halves [heads, head_dim padded to 16]."""
    if not isinstance(state, KeysValues):
        raise TypeError(f"CUDA keeps no state of kind {type(state).__name__}")
    return state.heads, padded_head(state.head_dim)


def half_bytes(state: LayerState, capacity: int) -> int:
    """Bytes of one layer's keys, or values."""
    heads, dim = token_shape(state)
    return FLOAT16.itemsize * capacity * heads * dim


class DeviceCache(Cache):
    """All layers' states in device memory."""

    def __init__(self, gpu: Gpu, states: Sequence[LayerState], capacity: int) -> None:
        super().__init__(capacity)
        self._gpu, self._states = gpu, states
        self._buffer = gpu.allocate(self.bytes_needed(states, capacity), f"a cache of {capacity} tokens")
        # Attention multiplies what lies past a sequence's end by zero, which must not be NaN.
        gpu.zero(int(self._buffer.handle), self._buffer.size)
        self._starts = self._layout()

    @staticmethod
    def bytes_needed(states: Sequence[LayerState], capacity: int) -> int:
        """Bytes of device memory."""
        return sum(2 * half_bytes(state, capacity) for state in states)

    def _layout(self) -> list[int]:
        """Where each layer's state begins in the buffer."""
        sizes = [2 * half_bytes(state, self.capacity) for state in self._states]
        return [sum(sizes[:layer]) for layer in range(len(sizes))]

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held."""
        return self._buffer.size if self._buffer is not None else 0

    def keys_values(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's keys and values from token 0 on: halves [capacity, heads, padded head_dim] each."""
        state = self._states[layer]
        shape = (self.capacity, *token_shape(state))
        start = int(self._buffer.handle) + self._starts[layer]
        keys = DeviceArray(start, FLOAT16, shape)
        return keys, DeviceArray(start + half_bytes(state, self.capacity), FLOAT16, shape)

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        """Launch what has the layer's `start` cached tokens ready in its arrays; n more are to be written there."""

    def end_batch(self, start: int, n: int) -> None:
        """Wait until the last layer's are kept."""

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
            self._buffer = None


class HostCache(DeviceCache):
    """All layers' states in page-locked host memory, of which two are on the device: while one is computed, the one
    before is copied out and the next comes in."""

    def __init__(self, gpu: Gpu, states: Sequence[LayerState], capacity: int) -> None:
        nbytes, most = DeviceCache.bytes_needed(states, capacity), host_memory() * 3 // 4
        if nbytes > most:
            raise BackendError(
                f"a cache of {capacity} tokens needs {gib(nbytes)} of host memory, as the GPU has no room for it; "
                f"at most {gib(most)} can be locked"
            )
        super().__init__(gpu, states, capacity)
        self._stream = gpu.device.create_stream()
        self._ready = [gpu.device.create_event() for _ in range(2)]
        self._host = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._host.madvise(mmap.MADV_HUGEPAGE)  # locked four times as fast
        self._bytes = np.frombuffer(self._host, np.uint8)
        with ThreadPoolExecutor(_THREADS) as pool:  # page-locking would zero the pages alone
            for begin in range(0, nbytes, WINDOW):
                address = self._bytes.ctypes.data + begin
                pool.submit(populate, address, min(WINDOW, nbytes - begin), write=True)
        with cuda_errors(f"page-locking {gib(nbytes)} of host memory for a cache of {capacity} tokens"):
            check(gpu.driver.cuMemHostRegister(self._bytes.ctypes.data, nbytes, 0))
        sizes = [half_bytes(state, capacity) for state in states]
        self._host_halves = [  # of each layer, keys and values: uint8 [capacity, bytes of a token]
            self._bytes[2 * sum(sizes[:i]) : 2 * sum(sizes[: i + 1])].reshape(2, capacity, -1)
            for i in range(len(sizes))
        ]

    @staticmethod
    def bytes_needed(states: Sequence[LayerState], capacity: int) -> int:
        return 2 * max(2 * half_bytes(state, capacity) for state in states)

    def _layout(self) -> list[int]:
        largest = max(2 * half_bytes(state, self.capacity) for state in self._states)
        return [layer % 2 * largest for layer in range(len(self._states))]

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        if layer == 0:
            self._copy_in(0, start)
        else:
            self._copy_out(layer - 1, start, n)
        self._gpu.stream.wait(self._ready[layer % 2])
        if layer + 1 < len(self._states):
            self._copy_in(layer + 1, start)

    def end_batch(self, start: int, n: int) -> None:
        self._copy_out(len(self._states) - 1, start, n)
        self._stream.sync()

    def _copy_in(self, layer: int, start: int) -> None:
        # The stream's order has this layer's room copied out of before it is written.
        if start:
            for array, kept in zip(self.keys_values(layer), self._host_halves[layer]):
                self._gpu.upload(array.address, kept[:start], self._stream)
        self._stream.record(self._ready[layer % 2])

    def _copy_out(self, layer: int, start: int, n: int) -> None:
        self._stream.wait(self._gpu.stream)  # the layer's attention has been launched
        for array, kept in zip(self.keys_values(layer), self._host_halves[layer]):
            part, source = kept[start : start + n], array.rows(start)
            handle, driver = self._stream.handle, self._gpu.driver
            check(driver.cuMemcpyDtoHAsync(part.ctypes.data, source.address, part.nbytes, handle))

    def close(self) -> None:
        if self._buffer is not None:
            self._gpu.driver.cuStreamSynchronize(self._stream.handle)
            self._gpu.driver.cuMemHostUnregister(self._bytes.ctypes.data)
            self._host_halves.clear()
            del self._bytes
            self._host.close()
            self._stream.close()
        super().close()
