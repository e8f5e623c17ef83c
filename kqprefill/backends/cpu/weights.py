"""Matrices decoded from the file's blocks, in float32, or rotated and rounded to int8; those that are asked for again
are kept while memory allows."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

from ...core import Float32Array
from ...gguf import ModelTensor, dequantize
from ...gguf.types import GGML
from ..budget import free_host_memory
from .int8 import Rounded

_Key: TypeAlias = tuple[str, int]  # a tensor's name, and the first row
_Form = TypeVar("_Form", Float32Array, Rounded)


class DecodedWeights:
    """What was decoded of a model's matrices, by rows.

    A first batch decodes each piece as it comes, and leaves nothing behind: a process that runs one prompt pays for no
    memory. What a second one asks for again is kept, from then on, until `room` bytes are taken: half of the host
    memory that is free at the start. Layers come in the same order in every batch, so that nothing kept ever leaves for
    another: each would be gone when its turn came.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = free_host_memory() // 2 if room is None else room
        self._decoded: dict[_Key, Float32Array] = {}
        self._rounded: dict[_Key, Rounded] = {}
        self._seen: set[_Key] = set()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        decoded = sum(matrix.nbytes for matrix in self._decoded.values())
        return decoded + sum(matrix.nbytes for matrix in self._rounded.values())

    def rows(self, tensor: ModelTensor, begin: int, end: int) -> Float32Array:
        """Rows of a matrix, float32 [end - begin, columns]; not to be written to. A tensor is always asked for in the
        same pieces."""
        key = tensor.name, begin
        if key in self._decoded:
            return self._decoded[key]
        decoded = dequantize(tensor.data[begin:end], tensor.type)
        if tensor.type != GGML.F32:  # those are the file's own bytes
            self._keep(self._decoded, key, decoded)
        return decoded

    def rounded(self, tensor: ModelTensor, begin: int, end: int) -> Rounded:
        """Rows of a matrix as `rows` gives them, rotated and rounded to int8."""
        key = tensor.name, begin
        if key in self._rounded:
            return self._rounded[key]
        made = Rounded.of(dequantize(tensor.data[begin:end], tensor.type))
        self._keep(self._rounded, key, made)
        return made

    def _keep(self, kept: dict[_Key, _Form], key: _Key, made: _Form) -> None:
        """Keep what has been made of a piece, where it was asked for before and there is room."""
        if key in self._seen and made.nbytes <= self._room:
            self._room -= made.nbytes
            kept[key] = made
        self._seen.add(key)

    def close(self) -> None:
        """Free what is kept."""
        self._decoded.clear()
        self._rounded.clear()
        self._seen.clear()
