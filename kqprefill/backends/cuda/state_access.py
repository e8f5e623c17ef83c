"""The states in a GPU's cache as real values, for whoever writes them to a file or reads them from one.

Rows come as they are kept, through slots of page-locked memory, on a stream of their own while the GPU computes on:
only its copy engine has to do with them, as its multiprocessors are never free at once. NumPy makes real values of
them, in the threads that take them. What is written goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
import ctypes
from dataclasses import dataclass
from functools import partial
import math
from queue import SimpleQueue
from threading import Lock, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import Float32Array, KeysValues, Latent, LayerState, Recurrent
from ...errors import InputError, StateError
from ...models.family import Family
from ...models.kda import KimiDelta
from ...states.elements import EXPONENT, all_finite
from ..base import StateAccess, TakeRows
from ..cpu.recurrent_ops import Recurrence, advance
from .constants import DELTA_CHUNK
from .device.arrays import DeviceArray
from .device.gpu import check, cuda_errors
from .device.workspace import ALIGNMENT
from .gemm.operand import operand_positions
from .kv_cache import DeviceCache, HostCache, RecurrentArrays, halo_rows, token_arrays, token_shapes
from .ops.context import Context

_SLOTS, _SLOT_BYTES = 16, 8 << 20  # each is made when there is none that is free
_NEVER = np.float32(-1e30)  # of a token that changes no recurrence: its step is softplus(this), its beta sigmoid(this)
_HOST_PIECE = 4096  # tokens
_ONE_MORE, _MOST_POWER = 1 << 10, 30  # of a half's exponent: one step among its bits; all of them
_WRITTEN = 2 << 20  # bytes of rows that a thread scales at a time: what its caches hold


@dataclass(frozen=True)
class _Slot:
    """Page-locked memory that rows are copied through, and the event after which those of the cache are there: from
    the first byte on the scales of a layer's two arrays, from ALIGNMENT on rows of both."""

    host: int
    landed: Any


class DeviceStates(StateAccess):
    """Of a DeviceCache or a HostCache, with what the ops work with."""

    def __init__(self, context: Context, family: Family, cache: DeviceCache) -> None:
        self._context, self._family, self._cache = context, family, cache
        self._gpu = context.gpu
        self._slots: list[_Slot] = []
        self._free: SimpleQueue[_Slot] = SimpleQueue()  # whose rows somebody has taken
        self._stream: Any = self._gpu.device.create_stream()
        self._factors: dict[int, list[np.float32]] = {}  # by layer: what its two arrays are times, for the host
        self._preparing = Lock()  # of what several threads that write are to have once

    def rows(self, layer: int, end: int, wide: bool, take: TakeRows, live: bool = False) -> Callable[[], None]:
        if not live and isinstance(self._cache, HostCache):
            return partial(self._rows_on_host, layer, end, take)
        with cuda_errors("reading a state"):
            copy = partial(self._copy_rows, layer, end, wide, take, self._gpu.stream.record())
            if not isinstance(self._cache, HostCache):
                return copy
            copy()  # before another layer comes in its place
            self._cache.wait_for(self._stream)
        return _nothing

    def _copy_rows(self, layer: int, end: int, wide: bool, take: TakeRows, computed: Any) -> None:
        """Have rows come to slots, as these become free; computed: the event after which the device has them."""
        with cuda_errors("reading a state"):
            self._gpu.device.set_current()
            self._stream.wait(computed)
            arrays = self._arrays(layer)
            step = max(1, (_SLOT_BYTES - ALIGNMENT) // sum(array.row_bytes for array in arrays))
            for begin in range(0, end, step):
                slot, parts = self._take_slot(), [array.rows(begin, min(end, begin + step)) for array in arrays]
                first, second = slot.host + ALIGNMENT, slot.host + ALIGNMENT + parts[0].nbytes
                held = zip((*self._cache.scales[layer], *parts), (slot.host, slot.host + 4, first, second))
                for array, to in held:
                    check(self._gpu.driver.cuMemcpyDtoHAsync(to, array.address, array.nbytes, self._stream.handle))
                self._stream.record(slot.landed)
                take(begin, self._landed(slot, layer, [part.shape for part in parts], wide))

    def _arrays(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's two arrays of halves on the device."""
        if isinstance(self._with_rows(layer), Latent):
            return self._cache.latent(layer)
        return self._cache.keys_values(layer)

    def _take_slot(self) -> _Slot:
        """One that is free, perhaps a new one; from any thread."""
        with self._preparing:
            if self._free.empty() and len(self._slots) < _SLOTS:
                host = self._gpu.locked(_SLOT_BYTES)
                self._slots.append(_Slot(host, self._gpu.device.create_event()))
                return self._slots[-1]
        return self._free.get()

    @contextmanager
    def _landed(
        self, slot: _Slot, layer: int, shapes: Sequence[tuple[int, ...]], wide: bool
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        state = self._with_rows(layer)
        try:
            with cuda_errors("reading a state"):
                self._gpu.device.set_current()
                slot.landed.sync()
            held = memoryview((ctypes.c_uint8 * _SLOT_BYTES).from_address(slot.host))
            rows, at = [], ALIGNMENT
            for number, (shape, scale) in enumerate(zip(shapes, np.frombuffer(held, np.float32, 2))):
                kept = np.frombuffer(held, np.float16, math.prod(shape), at).reshape(shape)
                cut, at = _cut(kept, state, number), at + kept.nbytes
                real = cut.astype(np.float32) * (1 / scale) if wide else _scaled(cut, 1 / scale, cut)
                if real is None:
                    raise InputError(f"layer {layer}: the state has a value that f16 cannot hold; use f32")
                rows.append(real)
            yield rows[0], rows[1]
        finally:
            self._free.put(slot)

    def _rows_on_host(self, layer: int, end: int, take: TakeRows) -> None:
        kept, state = self._halves(layer), self._with_rows(layer)
        factors = [1 / scale for scale in self._scales(layer)]
        for begin in range(0, end, _HOST_PIECE):
            rows = [a[begin : min(end, begin + _HOST_PIECE)].astype(np.float32) * f for a, f in zip(kept, factors)]
            take(begin, nullcontext((_cut(rows[0], state, 0), _cut(rows[1], state, 1))))

    def _halves(self, layer: int) -> list[NDArray[np.float16]]:
        """Both arrays of a layer as they are kept, of all the cache's capacity."""
        state = self._with_rows(layer)
        raw = self._cache.kept_bytes(layer)
        arrays = token_arrays(self._cache.offset(layer, type(state)), state, self._cache.capacity)
        return [raw[a.address : a.address + a.nbytes].view(np.float16).reshape(a.shape) for a in arrays]

    def _scales(self, layer: int) -> list[np.float32]:
        if layer not in self._factors:
            values = [np.empty(1, np.float32) for _ in self._cache.scales[layer]]
            for value, scale in zip(values, self._cache.scales[layer]):
                self._gpu.download(value, scale.address)
            self._factors[layer] = [value[0] for value in values]
        return self._factors[layer]

    def recurrence(self, layer: int) -> tuple[Float32Array, Float32Array]:
        """What is kept is the state after the last whole chunk, and the rows since: they are gone through here."""
        state = self._recurrent(layer)
        with cuda_errors("reading a state"):
            raw = self._cache.kept_bytes(layer)[self._cache.offset(layer, Recurrent) :]
        arrays = _recurrent_views(raw, state)
        length, halo = self._cache.length, halo_rows(state)
        matrices, sums, rates = arrays[0][0].copy(), arrays[1].copy(), arrays[2]
        sums[: max(0, halo - length)] = 0  # before the sequence's first token
        since = halo - (length % DELTA_CHUNK if state.heads else 0)
        if since == halo:
            return matrices, sums[halo - state.taps :]
        net, weights = self._family.recurrence, self._family.blocks[layer]
        rows, before, epsilon = sums[since:], sums[since - state.taps : since], self._family.config.norm_epsilon
        assert net is not None, "a family with a recurrence"
        _, after = advance(net, weights, rows, rates[since:], (matrices, before), epsilon)
        return after

    def _recurrent(self, layer: int) -> Recurrent:
        state = self._family.layer_states[layer].part(Recurrent)
        assert state is not None, "a layer with a recurrence"
        return state

    def _with_rows(self, layer: int) -> KeysValues | Latent:
        state = self._family.layer_states[layer]
        rows = state.part(KeysValues) or state.part(Latent)
        assert rows is not None, "a layer with rows of its own"
        return rows

    def write(self, layer: int, begin: int, first: NDArray[Any], second: NDArray[Any]) -> None:
        state = self._with_rows(layer)
        with cuda_errors("writing a state"):
            self._gpu.device.set_current()
            with self._preparing:
                scales = self._scales(layer)
            arrays = token_arrays(self._cache.offset(layer, type(state)), state, self._cache.capacity)
            for number, (rows, scale, array) in enumerate(zip((first, second), scales, arrays)):
                step = max(1, _WRITTEN // array.row_bytes)
                for at in range(0, len(rows), step):
                    halves = _scaled(rows[at : at + step], scale)
                    if halves is None:
                        raise StateError(f"layer {layer}: the state has values that this model cannot have made")
                    place = array.address + (begin + at) * array.row_bytes
                    self._keep(layer, place, _padded(halves, state, number).view(np.uint8).reshape(-1))

    def _keep(self, layer: int, offset: int, raw: NDArray[np.uint8]) -> None:
        """As the cache's keep_bytes, from any thread: of at most _WRITTEN bytes, or a single row's."""
        if isinstance(self._cache, HostCache):
            self._cache.keep_bytes(layer, offset, raw)
            return
        slot = self._take_slot()
        try:
            ctypes.memmove(slot.host, raw.ctypes.data, raw.nbytes)
            self._cache.begin_keeping(layer, offset, slot.host, raw.nbytes, self._stream)
            self._stream.record(slot.landed)
            slot.landed.sync()
        finally:
            self._free.put(slot)

    def write_recurrence(self, layer: int, matrices: Float32Array, rows: Float32Array) -> None:
        kept = _as_kept(self._recurrent(layer), self._family.recurrence, matrices, rows)
        with cuda_errors("writing a state"):
            self._cache.keep_bytes(layer, self._cache.offset(layer, Recurrent), kept)

    def close(self) -> None:
        for slot in self._slots:
            with cuda_errors("reading a state"):
                slot.landed.sync()
            self._gpu.driver.cuMemFreeHost(slot.host)
        self._stream.close()
        self._slots.clear()


def _nothing() -> None:
    """What is left to do where all has been done."""


def _cut(rows: NDArray[Any], state: LayerState, number: int) -> NDArray[Any]:
    """The values of rows as they are kept, without what pads them and in their own order."""
    if isinstance(state, Latent):
        return rows[:, operand_positions(state.rank)] if number == 0 else rows
    assert isinstance(state, KeysValues), "a layer with rows of its own"
    return rows[..., : state.head_dim]


class _Spare(local):
    """Arrays of a thread's, which it has again and again."""

    def __init__(self) -> None:
        self._twice, self._less = np.empty(0, np.uint16), np.empty(0, np.bool_)

    def arrays(self, shape: tuple[int, ...]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Of that shape, with whatever was there before."""
        size = math.prod(shape)
        if self._twice.size < size:
            self._twice, self._less = np.empty(size, np.uint16), np.empty(size, np.bool_)
        return self._twice[:size].reshape(shape), self._less[:size].reshape(shape)


_spare = _Spare()


def _scaled(
    rows: NDArray[Any], scale: np.float32, out: NDArray[np.float16] | None = None
) -> NDArray[np.float16] | None:
    """float32 or float16 rows times a power of two, as halves; None where one is too large for that. out: where those
    made of halves go, which may be these themselves; a new array unless given.

    Halves get it added to their exponents: to go through float32 takes several times as long (NumPy 2.5). Each of the
    few calls that do so has all rows: between calls a thread waits for its turn, and there are a dozen of them. Their
    intermediate values stay where they were the time before: the system would zero new memory.
    """
    power = math.frexp(scale)[1] - 1
    if rows.dtype != np.float16 or abs(power) > _MOST_POWER:
        with np.errstate(over="ignore"):
            halves = (rows * scale).astype(np.float16)
        return halves if all_finite(halves) else None
    out = np.empty(rows.shape, np.float16) if out is None else out
    bits, added = rows.view(np.uint16), power * _ONE_MORE
    twice, less = _spare.arrays(rows.shape)
    np.add(bits, bits, out=twice)  # without the sign: twice the exponent's bits and the mantissa's
    if int(twice.max(initial=0)) + 2 * max(0, added) >= 2 * int(EXPONENT):
        return None
    # Zeros, and what is less than any half with all its digits, there or then.
    np.less(twice, 2 * (max(0, -added) + _ONE_MORE), out=less)
    small = np.unravel_index(np.flatnonzero(less), rows.shape)
    exact = rows[small] * scale
    np.add(bits, np.uint16(added & 0xFFFF), out=out.view(np.uint16))
    out[small] = exact
    return out


def _padded(halves: NDArray[np.float16], state: KeysValues | Latent, number: int) -> NDArray[np.float16]:
    """The reverse of _cut."""
    if isinstance(state, KeysValues) and halves.shape[1:] == token_shapes(state)[number]:
        return halves
    out = np.zeros((len(halves), *token_shapes(state)[number]), np.float16)
    if isinstance(state, Latent):
        out[:, operand_positions(state.rank) if number == 0 else slice(None)] = halves
    else:
        out[..., : state.head_dim] = halves
    return out


def _recurrent_views(raw: NDArray[np.uint8], state: Recurrent) -> list[Float32Array]:
    """A recurrence's arrays (RecurrentArrays) in the bytes that a cache keeps."""
    places = RecurrentArrays.at(0, state)
    arrays = (places.state, places.sums, places.rates)
    return [raw[a.address : a.address + a.nbytes].view(np.float32).reshape(a.shape) for a in arrays]


def _as_kept(state: Recurrent, net: Recurrence | None, matrices: Float32Array, rows: Float32Array) -> NDArray[np.uint8]:
    """The bytes that a cache keeps of a recurrence after any token: the state as if it were that after the last whole
    chunk, and since then only tokens that change nothing."""
    raw = np.zeros(RecurrentArrays.at(0, state).nbytes, np.uint8)
    kept, sums, rates = _recurrent_views(raw, state)
    kept[0], rates[...] = matrices, _NEVER
    if isinstance(net, KimiDelta):  # whose rates are decays and beta themselves
        rates[:, : net.width], rates[:, net.width :] = 1, 0
    sums[len(sums) - state.taps :] = rows
    return raw
