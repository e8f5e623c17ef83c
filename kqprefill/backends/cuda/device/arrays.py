"""Arrays in device memory: where they lie, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

FLOAT32, FLOAT16, FLOAT64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64)
INT32, UINT32, UINT8 = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.uint8)
INT8 = np.dtype(np.int8)


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An array in device memory, its rows one after another.

    It names memory and does not own it: whoever allocated the memory keeps it.
    """

    address: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, start: int, stop: int | None = None) -> DeviceArray:
        """The rows from `start` to before `stop`, or to the end."""
        last = self.shape[0] if stop is None else stop
        return DeviceArray(self.address + start * self.row_bytes, self.dtype, (last - start, *self.shape[1:]))

    def columns(self, start: int) -> DeviceArray:
        """The same rows from column `start` on. They are still as far apart as before, which whoever reads them must
        know."""
        shape = (*self.shape[:-1], self.shape[-1] - start)
        return DeviceArray(self.address + start * self.dtype.itemsize, self.dtype, shape)
