"""Which chunks of its sequences a batch goes through, where layers are a recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....core import Int32Array, Segment
from ..constants import DELTA_CHUNK


@dataclass(frozen=True)
class ChunkLayout:
    """Of some segments, kernels/include/chunks.cuh's Chunk, int32 [chunks, 5], and delta_scan.cu's Sequence.

    sequences: int32 [sequences, 4] each; those of one array come after states that those of the arrays before it leave.
    states: how many of these there are.
    """

    chunks: Int32Array
    sequences: list[Int32Array]
    states: int


def chunk_layout(segments: Sequence[Segment], keep: bool = False) -> ChunkLayout:
    """The layout of segments whose rows are numbered from the first of them on.

    A segment that comes after none, but not at a sequence's first position, goes on from state 0; what comes before it
    are the rows before its first. keep: such a segment leaves its state as state 0 again, whether it begins there or
    not.
    """
    followed = {segment.after for segment in segments if segment.after is not None}
    states = {number: place for place, number in enumerate(sorted(followed))}
    chunks: list[tuple[int, ...]] = []
    levels: list[list[tuple[int, ...]]] = []
    depths: list[int] = []
    for number, segment in enumerate(segments):
        end, first = segment.position + segment.length, len(chunks)
        before = segments[segment.after] if segment.after is not None else None
        for start in range(segment.position // DELTA_CHUNK * DELTA_CHUNK, end, DELTA_CHUNK):
            row = segment.first + start - segment.position
            before_row = before.first + start - before.position if before is not None else row
            chunks.append((row, before_row, segment.position - start, min(DELTA_CHUNK, end - start), start))
        begun = segment.position >= DELTA_CHUNK
        source = -1 if not begun else 0 if segment.after is None else states[segment.after]
        leaves = states.get(number, 0 if keep else -1)
        depth = 0 if segment.after is None else depths[segment.after] + 1
        depths.append(depth)
        if depth == len(levels):
            levels.append([])
        levels[depth].append((first, len(chunks) - first, source, leaves))
    return ChunkLayout(
        np.array(chunks, np.int32),
        [np.array(level, np.int32) for level in levels],
        max(len(states), int(keep), int(any(s.after is None and s.position >= DELTA_CHUNK for s in segments))),
    )
