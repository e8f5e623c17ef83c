"""Quantised matrices as they lie in device memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
import math

from ....gguf import ModelTensor
from ....gguf.types import GGML
from ....models.family import Family
from ..constants import TILE_ROWS
from ..device.arrays import UINT8, DeviceArray
from ..device.workspace import aligned
from ..units import unit_size


@dataclass(frozen=True)
class Matrix:
    """Quantised rows in device memory, in the tiles of kernels/quants/common.cuh."""

    name: str
    type: GGML
    address: int
    rows: int
    columns: int

    @property
    def units(self) -> int:
        """Units in a row, the last perhaps padded."""
        return -(-self.columns // unit_size(self.type)[0])

    @property
    def row_tile_bytes(self) -> int:
        """Bytes of TILE_ROWS rows."""
        return TILE_ROWS * self.units * unit_size(self.type)[1]

    @property
    def row_tiles(self) -> int:
        """Tiles of TILE_ROWS rows, the last perhaps padded."""
        return -(-self.rows // TILE_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.row_tiles * self.row_tile_bytes

    @property
    def array(self) -> DeviceArray:
        """Its bytes: uint8 [row tiles, row_tile_bytes]."""
        return DeviceArray(self.address, UINT8, (self.row_tiles, self.row_tile_bytes))

    def one_of(self, count: int) -> Matrix:
        """The first of `count` matrices that lie one under another in this one."""
        return replace(self, rows=self.rows // count)


def matrix_of(tensor: ModelTensor, address: int = 0) -> Matrix:
    """A tensor as a Matrix; a stack of matrices as one, the rows of each under those of the one before."""
    *stacked, columns = tensor.shape
    return Matrix(tensor.name, tensor.type, address, math.prod(stacked), columns)


def layer_matrices(family: Family) -> list[list[ModelTensor]]:
    """The matrices' tensors of each layer."""
    return [[w.tensor for w in block if w.is_matrix] for block in family.blocks]


def tile_bytes(tensors: Iterable[ModelTensor]) -> int:
    """What tensors take in device memory together."""
    return sum(aligned(matrix_of(tensor).nbytes) for tensor in tensors)
