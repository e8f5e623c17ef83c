"""TMA descriptors (CUtensorMap): how Hopper's copy engine is told where a matrix of halves lies."""

import numpy as np

from .device import check
from .tiles import padded


class TensorMaps:
    """Descriptors in device memory, each made the first time that it is asked for."""

    def __init__(self, gpu, weights):
        self._gpu, self._weights = gpu, weights

    def of(self, address, columns, rows, box_rows):
        """Device address of the descriptor of a matrix whose rows are padded(columns) halves apart:
        boxes of box_rows rows by 64 columns, 128-byte swizzle, zeros outside."""

        def encode(to):
            d = self._gpu.driver
            stride = padded(columns)
            descriptor = check(
                d.cuTensorMapEncodeTiled(
                    d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                    2,
                    address,
                    [d.cuuint64_t(stride), d.cuuint64_t(rows)],
                    [d.cuuint64_t(2 * stride)],
                    [d.cuuint32_t(64), d.cuuint32_t(box_rows)],
                    [d.cuuint32_t(1)] * 2,
                    d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                    d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                    d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            )
            self._gpu.upload(to, np.array([int(word) for word in descriptor.opaque], np.uint64))

        return self._weights.descriptor((address, columns, rows, box_rows), encode)
