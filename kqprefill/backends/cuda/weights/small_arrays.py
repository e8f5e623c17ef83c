"""The small things of a model that stay on the device: norms, biases, scales, constants."""

from __future__ import annotations

from collections.abc import Callable, Hashable
import math
from typing import Any

import numpy as np

from ....core import Float32Array
from ....gguf import ModelTensor, dequantize
from ..device.arrays import FLOAT32, DeviceArray
from ..device.gpu import Gpu
from ..device.workspace import aligned

_SPAN_BYTES = 1 << 20  # of device memory that small arrays are cut from


class SmallArrays:
    """Device arrays that are made the first time they are asked for, and kept."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers: list[Any] = []
        self._next = self._room = 0  # where the last buffer's free bytes begin, and how many there are
        self._vectors: dict[tuple[str | int, ...], tuple[DeviceArray, Float32Array]] = {}
        self._made: dict[Hashable, DeviceArray] = {}

    def vector(self, *tensors: ModelTensor | int) -> tuple[DeviceArray, Float32Array]:
        """1-D tensors one after another as float32: (on the device, on the host).

        A length stands for that many zeros: an absent bias beside present ones.
        """
        key = tuple(t if isinstance(t, int) else t.name for t in tensors)
        if key not in self._vectors:
            parts = [np.zeros(t, np.float32) if isinstance(t, int) else dequantize(t.data, t.type) for t in tensors]
            host = np.concatenate(parts)
            array = self._reserve(FLOAT32, host.shape)
            self._gpu.upload(array.address, host)
            self._vectors[key] = array, host
        return self._vectors[key]

    def constant(self, values: np.ndarray[Any, Any]) -> DeviceArray:
        """A host array's values."""

        def make(array: DeviceArray) -> None:
            self._gpu.upload(array.address, values)

        return self.once((values.dtype.str, values.shape, values.tobytes()), values.dtype, values.shape, make)

    def once(
        self, key: Hashable, dtype: np.dtype, shape: tuple[int, ...], make: Callable[[DeviceArray], None]
    ) -> DeviceArray:
        """The array called `key`; make(array) fills it, the first time."""
        array = self._made.get(key)
        if array is None:
            array = self._reserve(dtype, shape)
            make(array)
            self._made[key] = array
        return array

    def _reserve(self, dtype: np.dtype, shape: tuple[int, ...]) -> DeviceArray:
        nbytes = aligned(dtype.itemsize * math.prod(shape))
        if self._room < nbytes:
            buffer = self._gpu.allocate(max(nbytes, _SPAN_BYTES), "norms, biases and scales")
            self._buffers.append(buffer)
            self._next, self._room = int(buffer.handle), buffer.size
        array = DeviceArray(self._next, dtype, shape)
        self._next, self._room = self._next + nbytes, self._room - nbytes
        return array

    def close(self) -> None:
        """Free all of it."""
        for buffer in self._buffers:
            buffer.close(self._gpu.stream)
        self._buffers.clear()
