"""Where attention finds the queries, keys and values of a batch's segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....core import Int32Array, Segment
from ....models.family import Family
from ..attention_kernels import AttentionConfig
from ..kernel_set import KernelSet


@dataclass(frozen=True)
class AttentionLayout:
    """tiles: of queries, int32 [tiles, 7], kernels/include/softmax.cuh's QueryTile, those with most keys first;
    chunk_tiles: the same of queries that see their own chunk of the sequence only, or None. rows: of k and v; row_of:
    each token's, int32 [T]; copies: int32 [copies, 2], rows that are to be copied and where to."""

    tiles: Int32Array
    rows: int
    row_of: Int32Array
    copies: Int32Array
    chunk_tiles: Int32Array | None = None


def attention_configs(family: Family, kernel_set: KernelSet) -> dict[tuple[int, int], AttentionConfig]:
    """The attention kernels of a family's layers, by the sizes of their heads (Family.head_dims).

    Raises ModelError where heads are too wide.
    """
    return {each: kernel_set.attention(*each) for each in family.all_head_dims}


def key_rows(family: Family, kernel_set: KernelSet, segments: Sequence[Segment]) -> int:
    """Rows of keys that a batch's segments have at most, in any layer."""
    configs = attention_configs(family, kernel_set).values()
    return max(attention_layout(segments, config).rows for config in configs)


def attention_layout(segments: Sequence[Segment], config: AttentionConfig, chunk: int | None = None) -> AttentionLayout:
    """The layout of a batch's segments for an attention kernel.

    chunk: in some layers queries see those keys only that are in their own chunk of so many, a multiple of block_kv: to
    the kernel each chunk is a sequence.

    Keys are walked block_kv at a time from the sequence's first on. A segment that continues another shares that one's
    whole blocks of keys, and has a copy of those in the block that its own first key is in: so its sums are those of
    the sequence in one piece, bit by bit.
    """
    block, rows = config.block_kv, 0
    starts: list[int] = []  # each segment's first row of k and v
    copies: list[tuple[int, int]] = []
    for segment in segments:
        copied = 0
        if segment.after is not None:
            copied = segment.position % block
            before = starts[segment.after] + segment.position - copied
            copies += [(before + i, rows + i) for i in range(copied)]
        starts.append(rows + copied)
        rows += copied + segment.length
    row_of = np.arange(rows)  # in order, where nothing is copied
    if copies:
        row_of = np.concatenate([np.arange(start, start + s.length) for s, start in zip(segments, starts)])
    tiles: list[tuple[int, ...]] = []
    chunk_tiles: list[tuple[int, ...]] = []
    for segment, start in zip(segments, starts):
        shared, shared_row, kv_row = 0, 0, start
        if segment.after is not None:
            shared, shared_row, kv_row = segment.position // block, starts[segment.after], start - segment.position
        elif segment.position:  # in a cache, whose first row is the sequence's
            kv_row = 0
        for at in range(0, segment.length, config.block_q):
            length = min(config.block_q, segment.length - at)
            keys = segment.position + segment.length
            tiles.append((segment.first + at, length, segment.position + at, kv_row, shared, shared_row, keys))
        if chunk is None:
            continue
        end = segment.position + segment.length
        for first in range(segment.position // chunk * chunk, end, chunk):  # of a chunk
            begin, last = max(segment.position, first), min(end, first + chunk)
            for at in range(begin, last, config.block_q):
                place = segment.first + at - segment.position, min(config.block_q, last - at), at - first
                own = max(0, shared - first // block), shared_row + first, last - first
                chunk_tiles.append((*place, kv_row + first, *own))
    for some in (tiles, chunk_tiles):
        some.sort(key=lambda tile: tile[2] + tile[1], reverse=True)
    return AttentionLayout(
        np.array(tiles, np.int32),
        rows,
        row_of.astype(np.int32),
        np.array(copies, np.int32).reshape(-1, 2),
        np.array(chunk_tiles, np.int32) if chunk is not None else None,
    )
