"""Weights on their way to the GPU: raw, as the file has them, into staging buffers on a stream of their own, while the
batch computes; then, where the batch has got that far, repacked into tiles; those of matrices in int8 are made of such
tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ....gguf import ModelTensor
from ....models.precision import Precision
from ..constants import TILE_ROWS
from ..device.arrays import UINT8, DeviceArray
from ..device.gpu import Gpu
from ..device.launcher import Launches
from ..device.workspace import aligned
from ..programs import int8_program, weight_program
from ..units import repack_units
from .host_pages import Uploader
from .matrix import Matrix, matrix_of

STAGING_SLOTS = 2
STAGING_BYTES = 64 << 20  # of a slot while weights that stay are loaded; streaming wants a layer's


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix from row `first`, a multiple of TILE_ROWS, as GGUF stores them: uint8 [rows, row bytes]."""

    matrix: Matrix
    first: int
    data: NDArray[np.uint8]


def pieces_of(matrix: Matrix, data: NDArray[np.uint8], most: int) -> list[Piece]:
    """A matrix in Pieces of at most `most` bytes each, and of what lies in one run on the host."""
    row_bytes = data.shape[-1]
    if matrix.int8:
        most = min(most, STAGING_BYTES)
    step = max(TILE_ROWS, most // row_bytes // TILE_ROWS * TILE_ROWS)
    pieces, begin = [], 0
    for run in [data] if data.flags.c_contiguous else list(data):
        rows = run.reshape(-1, row_bytes)
        pieces += [Piece(matrix, begin + at, rows[at : at + step]) for at in range(0, len(rows), step)]
        begin += len(rows)
    return pieces


def repack(launcher: Launches, matrix: Matrix, first: int, raw: DeviceArray) -> None:
    """Launch weights.cu's repack: GGUF's rows, uint8 [rows, row bytes], to a matrix's tiles from row `first`."""
    rows, row_bytes = raw.shape
    launcher.launch(
        weight_program(matrix.type),
        "repack",
        grid=(-(-matrix.units // repack_units(matrix.type)), -(-rows // TILE_ROWS)),
        source=raw,
        row_bytes=row_bytes,
        rows=rows,
        tiles=matrix.array.rows(first // TILE_ROWS),
        units=matrix.units,
    )


def unpack(launcher: Launches, matrix: Matrix, first: int, raw: DeviceArray, scratch: int | None) -> None:
    """Launch what makes GGUF's rows, uint8 [rows, row bytes], those of a matrix from row `first` on: repack, and for a
    matrix in int8 then make_int8. scratch: the address of room for the rows' tiles between both."""
    if not matrix.int8:
        return repack(launcher, matrix, first, raw)
    assert scratch is not None, "there is room to make matrices in int8"
    tiled = replace(matrix, address=scratch, rows=raw.shape[0], int8=False)
    repack(launcher, tiled, 0, raw)
    make_int8(launcher, tiled, matrix, first)


def make_int8(launcher: Launches, tiled: Matrix, matrix: Matrix, first: int = 0) -> None:
    """Launch int8_weights.cu's make_int8: tiles of quantised rows become those of a matrix in int8, from row
    `first` on."""
    launcher.launch(
        int8_program(matrix.type),
        "make_int8",
        grid=tiled.row_tiles,
        weights=tiled.array,
        units=tiled.units,
        groups=matrix.units,
        tiles=matrix.array.rows(first // TILE_ROWS),
        scales=matrix.scales.rows(first),
    )


def scratch_bytes(tensors: Iterable[ModelTensor], precision: Precision) -> int:
    """What the tiles take of which a Piece of a matrix in int8 is made, of the largest of these tensors' Pieces."""
    most = 0
    for tensor in tensors:
        matrix = matrix_of(tensor, 0, precision)
        if matrix.int8:
            row_bytes = tensor.nbytes // matrix.rows
            step = max(TILE_ROWS, STAGING_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)
            most = max(most, replace(matrix, rows=min(matrix.rows, step), int8=False).nbytes)
    return most


@dataclass(frozen=True)
class _Slot:
    """A staging buffer, and events: the copies into it have ended; what was in it has been repacked."""

    buffer: Any
    ready: Any
    free: Any


# What `Staging.bring` has brought: the slot, and each piece with its place in it.
Brought: TypeAlias = tuple[_Slot, list[tuple[Piece, DeviceArray]]]


class Staging:
    """Buffers of `slot_bytes` each, taken in turn."""

    def __init__(self, gpu: Gpu, launcher: Launches, slots: int, slot_bytes: int, keep: int, scratch: int = 0) -> None:
        """keep: bytes of host memory that may stay locked. scratch: device memory in which matrices in int8 are made.
        Raises BackendError."""
        self._gpu, self._launcher, self._stream = gpu, launcher, gpu.device.create_stream()
        self._uploader, self._next = Uploader(gpu, self._stream, keep), 0
        self._slots: list[_Slot] = []
        for _ in range(slots):
            buffer = gpu.allocate(slot_bytes, "streaming weights")
            self._slots.append(_Slot(buffer, gpu.device.create_event(), gpu.device.create_event()))
        self._scratch = gpu.allocate(scratch, "making weights int8") if scratch else None
        gpu.stream.sync()  # the buffers exist for the other stream too

    def read_ahead(self, data: NDArray[np.uint8]) -> bool:
        """Have a host array read from disk, if it lies there; False once enough is under way."""
        return self._uploader.read_ahead(data)

    def bring(self, pieces: Iterable[Piece]) -> Brought:
        """Copy Pieces, which fit a slot together, to the next slot. Returns what `unpack` wants."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self._stream.wait(slot.free)
        address, placed = int(slot.buffer.handle), []
        for piece in pieces:
            self._uploader.copy(piece.data, address)
            placed.append((piece, DeviceArray(address, UINT8, piece.data.shape)))
            address += aligned(piece.data.nbytes)
        self._stream.record(slot.ready)
        self._uploader.end_copies()
        return slot, placed

    def unpack(self, brought: Brought) -> None:
        """Launch what makes tiles of it, once it has come."""
        slot, placed = brought
        self._gpu.stream.wait(slot.ready)
        self._launcher.fence()
        scratch = int(self._scratch.handle) if self._scratch is not None else None
        for piece, raw in placed:
            unpack(self._launcher, piece.matrix, piece.first, raw, scratch)
        self._gpu.stream.record(slot.free)
        self._launcher.fence()  # GEMMs read weights without waiting for the kernel before them

    def end(self) -> None:
        """Free the buffers, once what was launched has read them: nothing more will be brought."""
        for slot in self._slots:
            slot.buffer.close(self._gpu.stream)
        self._slots.clear()
        if self._scratch is not None:
            self._scratch.close(self._gpu.stream)
            self._scratch = None

    def close(self) -> None:
        """Free everything; waits."""
        self.end()
        self._uploader.close()
        self._stream.close()
