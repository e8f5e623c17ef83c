"""TMA descriptors (CUtensorMap): how Hopper's copy engine is told where a matrix lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..device.arrays import FLOAT16, FLOAT32, INT8, UINT8, DeviceArray
from ..device.gpu import Gpu, check

_BYTES = 128  # of a descriptor
_BOX_BYTES = 128  # of a box's row: what the 128-byte swizzle takes
_TYPES = {FLOAT16: "FLOAT16", FLOAT32: "FLOAT32", INT8: "UINT8"}  # CUtensorMapDataType's; of int8 bits are copied


class TensorMaps:
    """Descriptors in device memory, each made the first time that it is asked for.

    At most CAPACITY of them exist. generation: changes when all are dropped, so that whoever keeps their addresses (a
    CUDA graph) can tell.
    """

    CAPACITY, A_BATCH = 4096, 256  # a batch asks for fewer than A_BATCH new ones

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.generation = gpu, 0
        self._maps: dict[tuple[int, tuple[int, ...], int, np.dtype[Any]], DeviceArray] = {}
        self._buffer: Any = None

    def of(self, array: DeviceArray, box_rows: int) -> DeviceArray:
        """The descriptor of a matrix [rows, columns]: boxes of box_rows rows by 128 bytes, 128-byte swizzle, zeros
        outside."""
        key = array.address, array.shape, box_rows, array.dtype
        if key not in self._maps:
            if self._buffer is None:
                self._buffer = self._gpu.allocate(self.CAPACITY * _BYTES, "tensor maps")
            assert len(self._maps) < self.CAPACITY, "make_room was not called before this batch"
            address = int(self._buffer.handle) + len(self._maps) * _BYTES
            self._gpu.upload(address, self._encode(array, box_rows))
            self._maps[key] = DeviceArray(address, UINT8, (_BYTES,))
        return self._maps[key]

    def _encode(self, array: DeviceArray, box_rows: int) -> np.ndarray[Any, Any]:
        d = self._gpu.driver
        rows, columns = array.shape
        descriptor = check(
            d.cuTensorMapEncodeTiled(
                getattr(d.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_TYPES[array.dtype]}"),
                2,
                array.address,
                [d.cuuint64_t(columns), d.cuuint64_t(rows)],
                [d.cuuint64_t(array.row_bytes)],
                [d.cuuint32_t(_BOX_BYTES // array.dtype.itemsize), d.cuuint32_t(box_rows)],
                [d.cuuint32_t(1)] * 2,
                d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return np.array([int(word) for word in descriptor.opaque], np.uint64)

    def make_room(self) -> None:
        """To be called before a batch: where there may be too little room for its descriptors, all are dropped."""
        if len(self._maps) > self.CAPACITY - self.A_BATCH:
            self.close()

    def close(self) -> None:
        """Drop all descriptors and free their memory, once what was launched has read them."""
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
            self._buffer = None
        self._maps.clear()
        self.generation += 1
