"""The operands of matrix products, and what every way to multiply them gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ....models.precision import OUTPUT_BLOCK, ROTATED
from ..constants import ACTIVATIONS, OPERAND_GROUP, TILE_ROWS
from ..device.arrays import FLOAT16, INT8, DeviceArray
from ..weights.matrix import Matrix
from .heads import HeadsOutput


@dataclass(frozen=True)
class OperandFormat:
    """How the activations that a GEMM multiplies are stored (kernels/include/operand.cuh: store_operand writes them).

    dtype: of a value. group: columns that are permuted among themselves; rows are padded to whole groups with zeros.
    """

    name: str
    dtype: np.dtype
    group: int

    def padded(self, columns: int) -> int:
        """Values from one row to the next."""
        return -(-columns // self.group) * self.group


HALVES = OperandFormat("f16", FLOAT16, OPERAND_GROUP)
BYTES = OperandFormat("s8", INT8, ROTATED)
MORE_ROWS = 256  # whose scales may be read beyond the last row's: as many as a kernel multiplies at a time at most


def output_row_bytes(columns: int) -> int:
    """Of a row of experts' outputs in blocks (kernels/include/output_blocks.cuh)."""
    blocks = -(-columns // TILE_ROWS) * TILE_ROWS // OUTPUT_BLOCK
    return -(-blocks * (OUTPUT_BLOCK + FLOAT16.itemsize) // 16) * 16


def operand_positions(columns: int) -> NDArray[np.intp]:
    """Where each of so many columns lies in an operand's row (kernels/include/operand.cuh: operand_position)."""
    c = np.arange(columns)
    assert OPERAND_GROUP == 64, "the permutation is one of 64 columns"
    return c & ~63 | (c >> 2 & 3) << 4 | (c >> 1 & 1) << 3 | (c >> 4 & 3) << 1 | c & 1


@dataclass(frozen=True)
class Operand:
    """A matrix of activations that a GEMM reads.

    values: [rows, format.padded(columns)]. scale: of halves one power of two, which the activations are times; of
    BYTES a factor for each row, which its integers are to be multiplied by once their columns have been rotated
    back, float32 [rows, and room to read MORE_ROWS beyond the last]. norm: the RMSNorm weight whose output this is,
    or None. length: a row's Euclidean length after division by `norm` is at most this, where it is known; together
    the two bound what a matrix makes of a row. row_scale: powers of two that the rows are still to be multiplied
    by, float32 [rows]; None for ones. Only `linear` takes such an operand. rounded: the same operand in int8, where
    whoever made it has made that, too: values, and scales, as of BYTES.
    """

    values: DeviceArray
    columns: int
    scale: DeviceArray
    norm: DeviceArray | None = None
    length: float | None = None
    format: OperandFormat = HALVES
    row_scale: DeviceArray | None = None
    rounded: tuple[DeviceArray, DeviceArray] | None = None

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.values.shape[0]

    def part(self, first: int, last: int) -> Operand:
        """The rows from `first` to before `last`."""
        scale = self.scale.rows(first, last) if self.format is BYTES else self.scale
        row_scale = self.row_scale.rows(first, last) if self.row_scale is not None else None
        rounded = self.rounded and (self.rounded[0].rows(first, last), self.rounded[1].rows(first, last))
        return replace(self, values=self.values.rows(first, last), scale=scale, row_scale=row_scale, rounded=rounded)


@dataclass(frozen=True)
class Groups:
    """The rows of an operand that each of so many experts multiplies, as kernels/experts.cu's arrange lists them.

    groups: int32 [at most so many, 4], kernels/include/groups.cuh's Group. count: int32 [1], how many there are.
    """

    groups: DeviceArray
    count: DeviceArray
    experts: int


def number_of(groups: Groups | None) -> int:
    """How many experts there are; 0 for a matrix that all rows are multiplied by."""
    return groups.experts if groups is not None else 0


def listed(groups: Groups | None) -> dict[str, DeviceArray | None]:
    """What a GEMM's kernel is told of the groups of its rows, by its parameters' names."""
    if groups is None:
        return {"groups": None, "group_count": None}
    return {"groups": groups.groups, "group_count": groups.count}


def made_into(act: Operand, activation: str) -> dict[str, DeviceArray | int]:
    """What a GEMM's kernel is told of the operand that its outputs become, by its parameters' names; activation: one of
    constants.ACTIVATIONS."""
    return {
        "out": act.values,
        "ldo": act.values.shape[1],
        "out_scale": act.scale,
        "activation": ACTIVATIONS[activation],
    }


class Gemm(ABC):
    """A way to multiply an operand by quantised matrices.

    Where `groups` are given, a matrix is the first of a stack of as many as there are experts, one under another, and
    each group of rows is multiplied by its expert's.
    """

    @abstractmethod
    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        """Rows that a group may have at most, for m rows that so many experts share: what `groups` must be made of."""

    def fullest_first(self, m: int, matrix: Matrix, experts: int) -> bool:
        """Whether `linear` is faster where groups of more rows come first; else those of an expert are neighbours."""
        return False

    @abstractmethod
    def linear(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None = None,
        out_scale: DeviceArray | None = None,
        ldo: int | None = None,
    ) -> None:
        """out = a · [matrices, one under another]ᵀ + bias, and + out if `add`; float32 [as many rows, all matrices'
        rows]. With groups: times *out_scale, and never + out: halves, or of matrices in int8 also blocks, if out is of
        such bytes (output_row_bytes).

        weight_scale: of the halves that the weights are multiplied as. bias: float32 [all rows], or [experts, rows], or
        None. ldo: values, or bytes, from one row of out to the next, where they are not all matrices' rows.
        """

    def heads(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        output: HeadsOutput,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
    ) -> bool:
        """Make heads of q, k and v of a · [matrices, one under another]ᵀ + bias, with the same bits as rotate_qkv makes
        of `linear`'s; False where this way does not, and nothing was launched."""
        return False

    @abstractmethod
    def activated(
        self,
        a: Operand,
        matrix: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        activation: str,
    ) -> None:
        """act = act(a · matrixᵀ + bias), of as many rows; activation: one of constants.ACTIVATIONS."""

    @abstractmethod
    def gated(
        self,
        a: Operand,
        gate: Matrix,
        up: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        biases: tuple[DeviceArray | None, DeviceArray | None],
        activation: str,
        groups: Groups | None = None,
    ) -> None:
        """act = act(a · gateᵀ + bias) * (a · upᵀ + bias), of as many rows; activation: one of constants.ACTIVATIONS."""
