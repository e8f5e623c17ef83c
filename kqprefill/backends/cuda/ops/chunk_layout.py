"""Which chunks of its sequences a batch goes through, where layers are a recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from ....core import Int32Array, Segment
from ..constants import DELTA_CHUNK


@dataclass(frozen=True)
class ChunkLayout:
    """Of some segments, kernels/include/chunks.cuh's Chunk, int32 [chunks, 5], and Sequence.

    sequences: int32 [sequences, 4] each; those of one array come after states that those of the arrays before it leave.
    states: how many of these there are.
    """

    chunks: Int32Array
    sequences: list[Int32Array]
    states: int


@dataclass(frozen=True)
class Part:
    """Rows first to last - 1 of a batch that are computed at a time, and their segments, numbered and with rows from
    there on. keeps: whether its one sequence goes on from state 0, or leaves it."""

    first: int
    last: int
    segments: tuple[Segment, ...]
    keeps: bool


def parts_of(segments: Sequence[Segment], most: int) -> list[Part]:
    """A batch's segments in Parts of at most so many chunks each, so that what is made of them need not exist for the
    whole batch.

    What comes after a segment stays with it, however many chunks they are; a longer sequence by itself is cut where
    chunks end, each part going on from the state of the one before.
    """
    # A part may begin with a segment if it comes after none, and those behind it after none before it.
    afters = [number if s.after is None else s.after for number, s in enumerate(segments)]
    lowest = list(accumulate(reversed(afters), min))[::-1]
    begins = [number for number in range(len(segments)) if lowest[number] == number == afters[number]]
    parts: list[Part] = []
    first = chunks = 0  # of the part under way: its first segment, and how many chunks it has
    for begin, end in zip(begins, [*begins[1:], len(segments)]):
        more = sum(map(_chunks_of, segments[begin:end]))
        if begin > first and chunks + more > most:
            parts += _parts(segments[first:begin], first, most)
            first, chunks = begin, 0
        chunks += more
    return parts + _parts(segments[first:], first, most)


def _chunks_of(segment: Segment) -> int:
    return -(-(segment.position + segment.length) // DELTA_CHUNK) - segment.position // DELTA_CHUNK


def _parts(own: Sequence[Segment], number: int, most: int) -> list[Part]:
    """Segments as one part; one segment as several, where it is long. number: the first one's in the batch."""
    row = own[0].first
    if len(own) > 1:
        moved = [replace(s, first=s.first - row, after=None if s.after is None else s.after - number) for s in own]
        return [Part(row, own[-1].first + own[-1].length, tuple(moved), keeps=False)]
    parts, [whole], done = [], own, 0
    while done < whole.length:
        position = whole.position + done
        length = min(whole.length - done, most * DELTA_CHUNK - position % DELTA_CHUNK)
        parts.append(Part(row + done, row + done + length, (Segment(0, length, position),), keeps=True))
        done += length
    return parts


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
        # A state that was read from a file is kept as if it were that of the chunk's beginning (state_access.py).
        begun = segment.position >= DELTA_CHUNK or (keep and segment.position > 0)
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
