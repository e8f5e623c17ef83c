"""Weights on their way to the GPU: raw, as the file has them, into staging buffers on a stream of their own, while the batch
computes; then, where the batch has got that far, repacked into tiles."""

from ctypes import c_int32 as i32
from dataclasses import dataclass

import numpy as np

from .kernels import weight_program
from .memory import Uploader, aligned
from .tiles import TILE_ROWS, repack_units

STAGING_SLOTS = 2
STAGING_BYTES = 64 << 20  # of a slot while weights that stay are loaded; streaming wants a layer's


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix (weights.Matrix) from row `first`, a multiple of TILE_ROWS, as GGUF stores them: uint8 [rows, row bytes]."""

    matrix: object
    first: int
    data: np.ndarray


def pieces_of(matrix, data, most):
    """A matrix in Pieces of at most `most` bytes each."""
    row_bytes = data.nbytes // matrix.rows
    step = max(TILE_ROWS, most // row_bytes // TILE_ROWS * TILE_ROWS)
    data = data.reshape(matrix.rows, row_bytes)
    return [Piece(matrix, first, data[first : first + step]) for first in range(0, matrix.rows, step)]


def repack(kernels, matrix, first, rows, row_bytes, raw):
    """Launch weights.cu's repack: `rows` rows in GGUF's order at `raw` to a matrix's tiles from row `first`."""
    grid = -(-matrix.units // repack_units(matrix.type)), -(-rows // TILE_ROWS)
    tiles = matrix.address + first // TILE_ROWS * matrix.row_tile_bytes
    kernels.launch(
        weight_program(matrix.type), "repack", grid, 256, raw, row_bytes, i32(rows), tiles, i32(matrix.units)
    )


@dataclass(frozen=True)
class _Slot:
    buffer: object
    ready: object  # event: the copies into it have ended
    free: object  # event: what was in it has been repacked


class Staging:
    """Buffers of `slot_bytes` each, taken in turn."""

    def __init__(self, gpu, kernels, slots, slot_bytes, keep):
        """keep: bytes of host memory that may stay locked. Raises BackendError."""
        self._gpu, self._kernels, self._stream = gpu, kernels, gpu.device.create_stream()
        self._uploader, self._slots, self._next = Uploader(gpu, self._stream, keep), [], 0
        for _ in range(slots):
            buffer = gpu.allocate(slot_bytes, "streaming weights")
            self._slots.append(_Slot(buffer, gpu.device.create_event(), gpu.device.create_event()))
        gpu.stream.sync()  # the buffers exist for the other stream too

    def read_ahead(self, data):
        """Have a host array read from disk, if it lies there; False once enough is under way."""
        return self._uploader.read_ahead(data)

    def bring(self, pieces):
        """Copy Pieces, which fit a slot together, to the next slot. Returns what `unpack` wants."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self._stream.wait(slot.free)
        at, placed = int(slot.buffer.handle), []
        for piece in pieces:
            self._uploader.copy(piece.data, at)
            placed.append((piece, at))
            at += aligned(piece.data.nbytes)
        self._stream.record(slot.ready)
        return slot, placed

    def unpack(self, brought):
        """Launch what makes tiles of it, once it has come."""
        slot, placed = brought
        self._gpu.stream.wait(slot.ready)
        self._kernels.fence()
        for piece, at in placed:
            rows, row_bytes = piece.data.shape
            repack(self._kernels, piece.matrix, piece.first, rows, row_bytes, at)
        self._gpu.stream.record(slot.free)
        self._kernels.fence()  # GEMMs read weights without waiting for the kernel before them

    def end(self):
        """Free the buffers, once what was launched has read them: nothing more will be brought."""
        for slot in self._slots:
            slot.buffer.close(self._gpu.stream)
        self._slots.clear()

    def close(self):
        """Free everything; waits."""
        self.end()
        self._uploader.close()
        self._stream.close()
