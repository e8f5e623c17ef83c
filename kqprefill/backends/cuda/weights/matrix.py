"""Matrices as they lie in device memory: quantised, as the file has them, or in int8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
import math

from ....gguf import ModelTensor
from ....gguf.types import GGML
from ....models.family import Family
from ....models.precision import ROTATED, Precision, takes_int8
from ....models.weights import Weight
from ..constants import TILE_ROWS
from ..device.arrays import FLOAT32, INT8, UINT8, DeviceArray
from ..device.workspace import aligned
from ..units import unit_size


@dataclass(frozen=True)
class Matrix:
    """Quantised rows in device memory, in the tiles of kernels/quants/common.cuh; or, int8, rows that were made int8 of
    such, in those of kernels/include/int8.cuh, and after all tiles a scale for each row.

    type: the file's. stacked: how many such matrices lie one under another, of which this is the first.
    """

    name: str
    type: GGML
    address: int
    rows: int
    columns: int
    int8: bool = False
    stacked: int = 1

    @property
    def unit(self) -> tuple[int, int]:
        """(weights, bytes) of a unit; in int8 it is a group of columns that are rotated together."""
        return (ROTATED, ROTATED) if self.int8 else unit_size(self.type)

    @property
    def units(self) -> int:
        """Units in a row, the last perhaps padded."""
        return -(-self.columns // self.unit[0])

    @property
    def row_tile_bytes(self) -> int:
        """Bytes of TILE_ROWS rows."""
        return TILE_ROWS * self.units * self.unit[1]

    @property
    def row_tiles(self) -> int:
        """Tiles of TILE_ROWS rows, the last perhaps padded."""
        return -(-self.rows // TILE_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.array.nbytes + (self.scales.nbytes if self.int8 else 0)

    @property
    def array(self) -> DeviceArray:
        """Its tiles: uint8 or int8 [row tiles, row_tile_bytes]."""
        return DeviceArray(self.address, INT8 if self.int8 else UINT8, (self.row_tiles, self.row_tile_bytes))

    @property
    def scales(self) -> DeviceArray:
        """In int8, what the integers of each row are multiplied by: float32 [rows of whole tiles]."""
        tiles = self.row_tiles * self.stacked
        return DeviceArray(self.address + tiles * self.row_tile_bytes, FLOAT32, (self.row_tiles * TILE_ROWS,))

    def one_of(self, count: int) -> Matrix:
        """The first of `count` matrices that lie one under another in this one."""
        return replace(self, rows=self.rows // count, stacked=count)


def matrix_of(tensor: ModelTensor, address: int = 0, precision: Precision = "exact") -> Matrix:
    """A tensor as a Matrix; a stack of matrices as one, the rows of each under those of the one before. precision: that
    the model is opened with."""
    *stacked, columns = tensor.shape
    int8 = precision == "int8" and takes_int8(Weight(tensor))
    return Matrix(tensor.name, tensor.type, address, math.prod(stacked), columns, int8)


def layer_matrices(family: Family) -> list[list[ModelTensor]]:
    """The matrices' tensors of each layer."""
    return [[w.tensor for w in block if w.is_matrix] for block in family.blocks]


def tile_bytes(tensors: Iterable[ModelTensor], precision: Precision = "exact") -> int:
    """What tensors take in device memory together, as matrices of a model that is opened with that precision."""
    return sum(aligned(matrix_of(tensor, 0, precision).nbytes) for tensor in tensors)
