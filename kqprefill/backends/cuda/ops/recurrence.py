"""What all recurrences share: a batch's rows a piece at a time, in chunks; the rows before them; the states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....core import Recurrent
from ....models.family import Family
from ..device.arrays import FLOAT32, DeviceArray
from ..kv_cache import RecurrentArrays, halo_rows
from .batch import CHUNKS_AT_ONCE
from .chunk_layout import Part, chunk_layout, parts_of
from .dense import DenseOps


@dataclass(frozen=True)
class Piece:
    """Tokens first to last - 1 of the batch: their chunks and sequences on the device, and how many states they leave.
    goes_on: whether they follow those of the piece before, or of a cache, in a sequence."""

    first: int
    last: int
    goes_on: bool
    chunks: DeviceArray
    sequences: list[DeviceArray]
    states: int


class RecurrenceOps(DenseOps):
    """Part of CudaOps."""

    def begin_batch(self, family: Family) -> None:
        super().begin_batch(family)
        self.pieces: list[Piece] = []
        if family.recurrence is not None:
            self.pieces = [
                self._upload_piece(*piece) for piece in enumerate(parts_of(self.batch.segments, CHUNKS_AT_ONCE))
            ]

    def _upload_piece(self, number: int, part: Part) -> Piece:
        layout = chunk_layout(part.segments, part.keeps)
        sequences = [self.keep(f"sequences {number}.{level}", array) for level, array in enumerate(layout.sequences)]
        states = max(layout.states, self.planned_chunks // 2)  # a sequence that leaves one is followed by another
        goes_on = part.keeps and part.segments[0].position > 0
        return Piece(part.first, part.last, goes_on, self.keep(f"chunks {number}", layout.chunks), sequences, states)

    @property
    def most_rows(self) -> int:
        """Of a piece."""
        return max(piece.last - piece.first for piece in self.pieces)

    def through_pieces(
        self, state: Recurrent, kept: RecurrentArrays | None, sums: DeviceArray, rates: DeviceArray
    ) -> Iterator[Piece]:
        """The batch's pieces, in turn. Whoever takes one makes its rows of sums and rates, from row halo_rows on,
        before the next; those before them are then what came before the piece in its sequence. At last they are
        kept."""
        halo, held = halo_rows(state), (sums, rates)
        if kept is not None and self.batch.start:
            for to, source in zip(held, (kept.sums, kept.rates)):
                self.copy(to.rows(0, halo), source)
        before = 0  # rows of the piece before
        for piece in self.pieces:
            if before and piece.goes_on:
                for array in held:
                    self.copy(array.rows(0, halo), array.rows(before, before + halo))
            yield piece
            before = piece.last - piece.first
        if kept is not None:
            for to, source in zip((kept.sums, kept.rates), held):
                self.copy(to, source.rows(before, before + halo))

    def states_of(self, name: str, state: Recurrent, kept: RecurrentArrays | None) -> DeviceArray:
        """Where states are: those of a cache's sequence, or as many as the batch's sequences leave."""
        if kept is not None:
            return kept.state
        count = max(1, *(piece.states for piece in self.pieces))
        return self.work.array(f"{name} states", FLOAT32, count, state.heads, state.key_dim, state.value_dim)

    def room_for(self, chunks: DeviceArray) -> int:
        """Chunks that arrays are made for."""
        return max(chunks.shape[0], self.planned_chunks)

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        """Copy an array on the device."""
        if to.nbytes:
            self.context.gpu.copy(to.address, source.address, to.nbytes)
            self.launcher.fence()
