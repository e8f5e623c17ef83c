"""Products in int8 (kqprefill.models.precision says of what, and how), in NumPy.

The sums of integers are exact in float32, which BLAS is fast in: a product is at most 127², and 1024 of them stay below
2^24, up to where float32 has every integer, in whatever order they are summed. The sums of each 1024 columns are added
up in float64, which has every integer up to 2^53. So a result does not depend on how the work is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
import math

import numpy as np
from numpy.typing import NDArray

from ...core import Float32Array
from ...models.precision import OUTPUT_BLOCK, ROTATED
from .threads import blas, in_parallel

_LARGEST = 127  # of the integers
_EXACT_COLUMNS = 1024  # _LARGEST**2 * _EXACT_COLUMNS < 2**24
_TILE_ROWS = 256  # of a matrix, which are float32 at a time
_ROTATED_AT_ONCE = 1 << 18  # elements that are rotated at a time


@dataclass(frozen=True)
class Rounded:
    """Rows that were rotated and rounded.

    integers: -127 to 127, int8 [n, columns], the columns filled up to a multiple of 128. scales: each row's, float32
    [n], which is not finite where the row held NaN or an infinity.
    """

    integers: NDArray[np.int8]
    scales: Float32Array

    @classmethod
    def of(cls, x: Float32Array) -> Rounded:
        """Of x, float32 [n, columns]; a row's integers and scale depend on that row alone."""
        rows, columns = x.shape
        padded = -(-columns // ROTATED) * ROTATED
        made = cls(np.empty((rows, padded), np.int8), np.empty(rows, np.float32))
        step = max(1, _ROTATED_AT_ONCE // padded)
        in_parallel([partial(made._round, x, slice(at, min(at + step, rows))) for at in range(0, rows, step)])
        return made

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.integers.nbytes + self.scales.nbytes

    def _round(self, x: Float32Array, rows: slice) -> None:
        turned = rotated(x[rows])
        with np.errstate(all="ignore"):  # what is not finite is told by the scale
            scales = np.abs(turned).max(axis=1) / np.float32(_LARGEST)
            turned /= np.where(scales == 0, np.float32(1), scales)[:, None]
            self.integers[rows] = np.clip(np.rint(turned), -_LARGEST, _LARGEST)
        self.scales[rows] = scales


def rotated(x: Float32Array) -> Float32Array:
    """Each 128 columns of x, float32 [n, columns], times the orthogonal Hadamard matrix of 128; with columns of zeros
    up to a multiple of 128 before that.

    By seven steps of sums and differences (the fast Walsh-Hadamard transform), element by element in float32: BLAS
    would sum in an order that depends on n.
    """
    rows, columns = x.shape
    padded = -(-columns // ROTATED) * ROTATED
    whole = x if padded == columns else np.pad(x, ((0, 0), (0, padded - columns)))
    now = np.ascontiguousarray(whole.reshape(-1, ROTATED).T)  # of all groups the first elements, the second, …
    then, half = np.empty_like(now), 1
    while half < ROTATED:
        pairs, made = (lanes.reshape(-1, 2, half, now.shape[1]) for lanes in (now, then))
        np.add(pairs[:, 0], pairs[:, 1], out=made[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=made[:, 1])
        now, then, half = then, now, 2 * half
    now *= np.float32(1 / math.sqrt(ROTATED))
    return np.ascontiguousarray(now.T).reshape(rows, padded)


def in_blocks(x: Float32Array) -> Float32Array:
    """What is left of experts' outputs x, float32 [n, columns], where each block of a row (models/precision.py) is
    rounded to integers of -127 to 127 times one factor; NaN where a block held NaN or an infinity."""
    rows, columns = x.shape
    # Of 32 columns by two halves, each of eight columns of either block.
    blocks = np.pad(x, ((0, 0), (0, -columns % (2 * OUTPUT_BLOCK)))).reshape(rows, -1, 2, 2, OUTPUT_BLOCK // 2)
    with np.errstate(all="ignore"):
        factors = np.abs(blocks).max(axis=(2, 4), keepdims=True) / np.float32(_LARGEST)
        rounded: Float32Array = np.rint(blocks / np.where(factors == 0, np.float32(1), factors)) * factors
    return rounded.reshape(rows, -1)[:, :columns]


def multiply_rounded(a: Rounded, matrix: Rounded, out: Float32Array) -> None:
    """a · matrixᵀ, of a [T, columns] and a matrix [rows, columns], to out, float32 [T, rows], on all cores: the exact
    sums of integers, rounded to float32, times the token's scale, times the row's."""
    rows = len(matrix.scales)
    integers = a.integers.astype(np.float32)

    def tile(own: slice) -> None:
        total = np.zeros((len(integers), own.stop - own.start))
        for at in range(0, integers.shape[1], _EXACT_COLUMNS):
            columns = slice(at, at + _EXACT_COLUMNS)
            total += integers[:, columns] @ matrix.integers[own, columns].astype(np.float32).T
        np.multiply(total.astype(np.float32), a.scales[:, None], out=out[:, own])
        out[:, own] *= matrix.scales[own]

    height = min(_TILE_ROWS, -(-rows // blas().threads))
    in_parallel([partial(tile, slice(at, min(at + height, rows))) for at in range(0, rows, height)])
