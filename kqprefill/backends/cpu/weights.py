"""Matrices in float32, decoded from the file's blocks; those that are asked for again are kept while memory allows."""

from __future__ import annotations

from ...core import Float32Array
from ...gguf import ModelTensor, dequantize
from ...gguf.types import GGML
from ..budget import free_host_memory


class DecodedWeights:
    """What was decoded of a model's matrices, by rows.

    A first batch decodes each piece as it comes, and leaves nothing behind: a process that runs one prompt pays for no
    memory. What a second one asks for again is kept, from then on, until `room` bytes are taken: half of the host
    memory that is free at the start. Layers come in the same order in every batch, so that nothing kept ever leaves for
    another: each would be gone when its turn came.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = free_host_memory() // 2 if room is None else room
        self._kept: dict[tuple[str, int], Float32Array] = {}  # by the tensor's name and the first row
        self._seen: set[tuple[str, int]] = set()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(matrix.nbytes for matrix in self._kept.values())

    def rows(self, tensor: ModelTensor, begin: int, end: int) -> Float32Array:
        """Rows of a matrix, float32 [end - begin, columns]; not to be written to. A tensor is always asked for in the
        same pieces."""
        key = tensor.name, begin
        if key in self._kept:
            return self._kept[key]
        decoded = dequantize(tensor.data[begin:end], tensor.type)
        if tensor.type == GGML.F32:  # the file's own bytes
            return decoded
        if key in self._seen and decoded.nbytes <= self._room:
            self._room -= decoded.nbytes
            self._kept[key] = decoded
        self._seen.add(key)
        return decoded

    def close(self) -> None:
        """Free what is kept."""
        self._kept.clear()
        self._seen.clear()
