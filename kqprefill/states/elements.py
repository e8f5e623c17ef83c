"""What a state's numbers are stored as: ggml's f32, f16 and q8_0, the last one rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array
from ..errors import InputError
from . import TYPES

Bytes = NDArray[np.uint8]

_Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])  # ggml's block_q8_0
_LEAST_ROTATION = 64  # a head is rotated where this divides its size
EXPONENT = np.uint16(0x7C00)  # the bits of a half's exponent, all of which are set where it is infinite or NaN


@dataclass(frozen=True)
class Element:
    """A type of numbers. number: ggml's for it. block: values that are stored together, in `nbytes` bytes."""

    name: str
    number: int
    block: int
    nbytes: int

    def row_bytes(self, width: int) -> int:
        """Of so many values, a multiple of `block`."""
        return width // self.block * self.nbytes

    @property
    def quantised(self) -> bool:
        """Whether values share a scale: llama.cpp keeps these rotated, and never transposed."""
        return self.block > 1


_SIZES = {"f16": (1, 1, 2), "f32": (0, 1, 4), "q8_0": (8, 32, 34)}
ELEMENTS = {name: Element(name, *_SIZES[name]) for name in TYPES}


def key_rotation(element: Element, head_dims: set[int]) -> int:
    """How many values of a key are rotated together, 0 for none, where a cache's layers have heads of these sizes: the
    largest 64 * 2^i that divides the size (llama.cpp's PR 21038)."""
    if not value_rotation(element, head_dims):
        return 0
    [head_dim], size = head_dims, _LEAST_ROTATION
    while head_dim % (2 * size) == 0:
        size *= 2
    return size


def value_rotation(element: Element, head_dims: set[int]) -> int:
    """The same for values: 64, whatever the size."""
    rotated = element.quantised and len(head_dims) == 1 and max(head_dims) % _LEAST_ROTATION == 0
    return _LEAST_ROTATION if rotated and max(head_dims) else 0


def rotate(rows: Float32Array, size: int) -> Float32Array:
    """Each `size` values of float32 [n, width] times the orthonormal Hadamard matrix in Sylvester's order, which is its
    own inverse; as they are where size is 0."""
    if not size:
        return rows
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned: Float32Array = (rows.reshape(-1, size) @ (matrix / np.float32(np.sqrt(size)))).reshape(rows.shape)
    return turned


def encode(rows: NDArray[Any], element: Element) -> Bytes:
    """Rows float32 [n, width] as bytes [n, element.row_bytes(width)]; or float16 ones, which are known to be finite.

    Raises InputError for a value that the type cannot hold: one that is not finite, or is too large for f16.
    """
    if rows.dtype == np.float16 and element.name == "f16":
        return np.ascontiguousarray(rows, "<f2").view(np.uint8).reshape(len(rows), -1)
    if element.name == "f32":
        stored: NDArray[Any] = np.ascontiguousarray(rows, "<f4")
        finite = all_finite(stored)
    elif element.name == "f16":
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, "<f2")
        finite = all_finite(stored)
    else:
        stored = _quantised(np.asarray(rows, np.float32))
        finite = all_finite(stored["scale"])
    if not finite:
        known = rows[np.isfinite(rows)]
        largest = float(np.abs(known, dtype=np.float32).max()) if known.size == rows.size and known.size else np.inf
        raise InputError(f"the state has a value of magnitude {largest:.4g}, which {element.name} cannot hold; use f32")
    return stored.view(np.uint8).reshape(len(rows), -1)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value of float16 or float32 is infinite or NaN."""
    if values.dtype == np.float16:  # by its exponents, several times as fast as isfinite
        return bool(((values.view(np.uint16) & EXPONENT) != EXPONENT).all())
    return bool(np.isfinite(values).all())


def _quantised(rows: Float32Array) -> NDArray[Any]:
    """[n, width / 32] of _Q8_BLOCK, as ggml's quantize_row_q8_0_ref makes them."""
    blocks = rows.reshape(len(rows), -1, 32)
    scale = np.abs(blocks).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, 1 / scale, np.float32(0))
        out = np.empty(scale.shape, _Q8_BLOCK)
        out["scale"] = scale
        scaled = blocks * inverse[..., None]
        out["values"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero
    return out


def decode(raw: Bytes, element: Element) -> NDArray[Any]:
    """Bytes [n, row bytes], rows one after another, as real values [n, width]: float32, but of f16 the very halves."""
    raw = np.ascontiguousarray(raw)
    if element.quantised:
        blocks = raw.view(_Q8_BLOCK)
        values = blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[..., None]
        return values.reshape(len(raw), -1)
    return raw.view("<f4" if element.name == "f32" else "<f2")
