"""Where the layers' states of a kept sequence live: on the device, or in host memory with two layers on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import KeysValues, Latent, LayerState, Recurrent, Several, SharedKeysValues
from ...errors import BackendError
from ...models.family import Family
from ..base import Cache
from ..budget import gib, host_memory
from .attention_kernels import padded_head
from .constants import DELTA_CHUNK
from .device.arrays import FLOAT16, FLOAT32, DeviceArray
from .device.gpu import Gpu, check, cuda_errors
from .device.workspace import aligned
from .gemm.operand import HALVES
from .weights.host_pages import WINDOW, populate

_THREADS = 8


def token_shapes(state: KeysValues | Latent) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What one token takes in each of the two arrays of halves that such a layer has: of keys and of values [heads,
    head_dim padded to 16]; of latent rows [rank padded, in the order of an operand] and [rotary]."""
    if isinstance(state, Latent):
        return (HALVES.padded(state.rank),), (state.rotary,)
    shape = state.heads, padded_head(state.head_dim)
    return shape, shape


def token_arrays(address: int, state: KeysValues | Latent, capacity: int) -> tuple[DeviceArray, DeviceArray]:
    """Those arrays, a row for each of `capacity` tokens, one after the other from an address on."""
    first, second = token_shapes(state)
    before = DeviceArray(address, FLOAT16, (capacity, *first))
    return before, DeviceArray(address + before.nbytes, FLOAT16, (capacity, *second))


def halo_rows(state: Recurrent) -> int:
    """Rows of a recurrence's inputs that are kept of a sequence: those of the chunk that it ended in, which is gone
    through again when it goes on, and those that the convolution wants before them; or these alone, where there is no
    more than a convolution."""
    return (DELTA_CHUNK - 1 if state.heads else 0) + state.taps


@dataclass(frozen=True)
class RecurrentArrays:
    """A recurrence's state on the device.

    state: float32 [1, heads, key_dim, value_dim], after the last whole chunk. sums, rates: the last rows of what the
    layer's matrices made, float32 [halo_rows, channels] and [halo_rows, rates].
    """

    state: DeviceArray
    sums: DeviceArray
    rates: DeviceArray

    @classmethod
    def at(cls, address: int, state: Recurrent) -> RecurrentArrays:
        """The arrays one after another from an address on."""
        rows = halo_rows(state)
        shapes = (1, state.heads, state.key_dim, state.value_dim), (rows, state.channels), (rows, state.rates)
        arrays = []
        for shape in shapes:
            arrays.append(DeviceArray(address, FLOAT32, shape))
            address += aligned(arrays[-1].nbytes)
        return cls(*arrays)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(aligned(array.nbytes) for array in (self.state, self.sums, self.rates))


def state_bytes(state: LayerState, capacity: int) -> int:
    """Bytes of one layer's state, of a sequence of at most `capacity` tokens."""
    if isinstance(state, (KeysValues, Latent)):
        return aligned(sum(array.nbytes for array in token_arrays(0, state, capacity)))
    if isinstance(state, Recurrent):
        return RecurrentArrays.at(0, state).nbytes
    if isinstance(state, SharedKeysValues):
        return 0
    if isinstance(state, Several):
        return sum(state_bytes(part, capacity) for part in state.parts)
    raise TypeError(f"CUDA keeps no state of kind {type(state).__name__}")


def _has_rows(state: LayerState) -> bool:
    """Whether a layer keeps rows of tokens, which attention reads, and perhaps a recurrence's state behind them."""
    return any(isinstance(part, (KeysValues, Latent, SharedKeysValues)) for part in state.parts)


def states_of(family: Family, layers: range) -> list[LayerState]:
    """What each layer of a model keeps on the device that runs some of them: the others nothing."""
    return [state if index in layers else Several() for index, state in enumerate(family.layer_states)]


class DeviceCache(Cache):
    """The states of layers in device memory: of some of a model's (states_of), or of all unless `layers` says which."""

    def __init__(self, gpu: Gpu, states: Sequence[LayerState], capacity: int, layers: range | None = None) -> None:
        super().__init__(capacity)
        self._gpu, self._states, self._layers = gpu, states, layers or range(len(states))
        self._buffer = gpu.allocate(self.bytes_needed(states, capacity), f"a cache of {capacity} tokens")
        # Attention multiplies what lies past a sequence's end by zero, which must not be NaN.
        gpu.zero(int(self._buffer.handle), self._buffer.size)
        self._starts = self._layout()
        self.scales: dict[int, tuple[DeviceArray, DeviceArray]] = {}  # by layer, of its two arrays of halves

    @staticmethod
    def bytes_needed(states: Sequence[LayerState], capacity: int) -> int:
        """Bytes of device memory."""
        return sum(state_bytes(state, capacity) for state in states)

    def _layout(self) -> list[int]:
        """Where each layer's state begins in the buffer."""
        sizes = [state_bytes(state, self.capacity) for state in self._states]
        return [sum(sizes[:layer]) for layer in range(len(sizes))]

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held."""
        return self._buffer.size if self._buffer is not None else 0

    def _address(self, layer: int) -> int:
        return int(self._buffer.handle) + self._starts[layer]

    def offset(self, layer: int, kind: type[LayerState]) -> int:
        """Where, in bytes of what a layer keeps, its state of that kind begins."""
        parts = self._states[layer].parts
        before = takewhile(lambda part: not isinstance(part, kind), parts)
        return sum(state_bytes(part, self.capacity) for part in before)

    def keys_values(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's keys and values from token 0 on: halves [capacity, heads, padded head_dim] each."""
        state = self._states[layer].part(KeysValues)
        assert state is not None, "a layer with attention"
        return token_arrays(self._address(layer) + self.offset(layer, KeysValues), state, self.capacity)

    def latent(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's latent rows from token 0 on, in two arrays (token_shapes): halves [capacity, ...] each."""
        state = self._states[layer].part(Latent)
        assert state is not None, "a layer with latent attention"
        return token_arrays(self._address(layer) + self.offset(layer, Latent), state, self.capacity)

    def recurrent(self, layer: int) -> RecurrentArrays:
        """A layer's recurrent state."""
        state = self._states[layer].part(Recurrent)
        assert state is not None, "a layer with a recurrence"
        return RecurrentArrays.at(self._address(layer) + self.offset(layer, Recurrent), state)

    def note_scales(self, layer: int, first: DeviceArray, second: DeviceArray) -> None:
        """Say what the halves in a layer's two arrays are times: float32 [1] each, the same for every batch."""
        self.scales[layer] = first, second

    def kept_bytes(self, layer: int) -> NDArray[np.uint8]:
        """What is kept of a layer, for the host; between batches."""
        raw = np.empty(state_bytes(self._states[layer], self.capacity), np.uint8)
        self._gpu.download(raw, self._address(layer))
        return raw

    def keep_bytes(self, layer: int, offset: int, raw: NDArray[np.uint8]) -> None:
        """Write to what is kept of a layer; between batches."""
        self._gpu.upload(self._address(layer) + offset, raw)
        self._gpu.stream.sync()

    def begin_keeping(self, layer: int, offset: int, host: int, nbytes: int, stream: Any) -> None:
        """As keep_bytes, from page-locked memory, in the order of a stream that is not waited for."""
        address = self._address(layer) + offset
        check(self._gpu.driver.cuMemcpyHtoDAsync(address, host, nbytes, stream.handle))

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        """Launch what has the layer's state of `start` cached tokens ready; n more are to come."""

    def end_batch(self, start: int, n: int) -> None:
        """Wait until the last layer's state is kept."""

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
            self._buffer = None


class HostCache(DeviceCache):
    """The layers' states in page-locked host memory, of which two of a kind are on the device: while one is computed,
    the one before is copied out and the next comes in. States that later layers see, too, stay for the whole batch."""

    def __init__(self, gpu: Gpu, states: Sequence[LayerState], capacity: int, layers: range | None = None) -> None:
        nbytes, most = DeviceCache.bytes_needed(states, capacity), host_memory() * 3 // 4
        if nbytes > most:
            raise BackendError(
                f"a cache of {capacity} tokens needs {gib(nbytes)} of host memory, as the GPU has no room for it; "
                f"at most {gib(most)} can be locked"
            )
        super().__init__(gpu, states, capacity, layers)
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
            check((gpu.lock(self._bytes.ctypes.data, nbytes),))
        sizes = [state_bytes(state, capacity) for state in states]
        starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
        self._on_host = [self._bytes[start : start + size] for start, size in zip(starts, sizes)]

    @staticmethod
    def bytes_needed(states: Sequence[LayerState], capacity: int) -> int:
        nbytes, _ = HostCache._places(states, capacity)
        return nbytes

    @staticmethod
    def _places(states: Sequence[LayerState], capacity: int) -> tuple[int, list[int]]:
        """(bytes on the device, where each layer's state begins there).

        Layers of a kind take two rooms in turn; those that later layers see, too, have one each. Recurrences are a kind
        of their own: attention multiplies what lies past a sequence's end by zero, and a float's halves may be NaN.
        """
        sizes = [state_bytes(state, capacity) for state in states]
        staying = {state.layer for state in states if isinstance(state, SharedKeysValues)}
        starts, end = [0] * len(sizes), 0
        for recurrent in (False, True):
            own = [i for i, s in enumerate(states) if _has_rows(s) != recurrent and i not in staying]
            room = max((sizes[layer] for layer in own), default=0)
            for layer in own:
                starts[layer] = end + layer % 2 * room
            end += 2 * room
        for layer in sorted(staying):
            starts[layer] = end
            end += sizes[layer]
        return end, starts

    def _layout(self) -> list[int]:
        _, starts = self._places(self._states, self.capacity)
        return starts

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        if layer == self._layers.start:
            self._copy_in(layer, start)
        else:
            self._copy_out(layer - 1, start, n)
        self._gpu.stream.wait(self._ready[layer % 2])
        if layer + 1 < self._layers.stop:
            self._copy_in(layer + 1, start)

    def end_batch(self, start: int, n: int) -> None:
        self._copy_out(self._layers.stop - 1, start, n)
        self._stream.sync()

    def wait_for(self, stream: Any) -> None:
        """Have no other layer come to the device before a stream has got to where it is now."""
        self._stream.wait(stream)

    def kept_bytes(self, layer: int) -> NDArray[np.uint8]:
        return self._on_host[layer]

    def keep_bytes(self, layer: int, offset: int, raw: NDArray[np.uint8]) -> None:
        self._on_host[layer][offset : offset + len(raw)] = raw

    def _runs(self, layer: int, first: int, last: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """(bytes on the host, their device address) of what a layer keeps of tokens first to last - 1: their rows in
        both arrays, or the whole of a recurrence's state."""
        host, address, state = self._on_host[layer], self._address(layer), self._states[layer]
        for part in state.parts:
            begin = self.offset(layer, type(part))
            if not isinstance(part, (KeysValues, Latent)):
                nbytes = state_bytes(part, self.capacity)
                if nbytes:
                    yield host[begin : begin + nbytes], address + begin
                continue
            for array in token_arrays(address + begin, part, self.capacity):
                at = array.address - address
                low, high = first * array.row_bytes, last * array.row_bytes
                yield host[at + low : at + high], array.address + low

    def _copy_in(self, layer: int, start: int) -> None:
        # The stream's order has this layer's room copied out of before it is written.
        if start:
            for kept, address in self._runs(layer, 0, start):
                self._gpu.upload(address, kept, self._stream)
        self._stream.record(self._ready[layer % 2])

    def _copy_out(self, layer: int, start: int, n: int) -> None:
        self._stream.wait(self._gpu.stream)  # what writes the layer's state has been launched
        handle, driver = self._stream.handle, self._gpu.driver
        for kept, address in self._runs(layer, start, start + n):
            check(driver.cuMemcpyDtoHAsync(kept.ctypes.data, address, kept.nbytes, handle))

    def close(self) -> None:
        if self._buffer is not None:
            self._gpu.driver.cuStreamSynchronize(self._stream.handle)
            self._gpu.driver.cuMemHostUnregister(self._bytes.ctypes.data)
            self._on_host.clear()
            del self._bytes
            self._host.close()
            self._stream.close()
        super().close()
