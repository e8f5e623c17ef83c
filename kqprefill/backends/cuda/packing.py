"""Where attention finds the queries, keys and values of a batch's segments."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """tiles: int32 [tiles, 6], kernels/include/softmax.cuh's Tile, those with most keys first. rows: of k and v; row_of: each
    token's, int32 [T]; copies: int32 [copies, 2], rows that are to be copied and where to."""

    tiles: np.ndarray
    rows: int
    row_of: np.ndarray
    copies: np.ndarray


def lay_out(segments, tile):
    """The Layout of a batch's Segments for an attention kernel's tile.

    Keys are walked block_kv at a time from the sequence's first on. A segment that continues another shares that one's whole
    blocks of keys, and has a copy of those in the block that its own first key is in: so its sums are those of the sequence
    in one piece, bit by bit.
    """
    block, starts, row_of, copies, rows = tile.block_kv, [], [], [], 0
    for segment in segments:
        own = segment.position % block if segment.after is not None else 0
        if own:
            before = starts[segment.after] + segment.position - own
            copies += [(before + i, rows + i) for i in range(own)]
        starts.append(rows + own)
        row_of.append(np.arange(rows + own, rows + own + segment.length, dtype=np.int32))
        rows += own + segment.length
    tiles = []
    for segment, start in zip(segments, starts):
        shared, shared_row, kv_row = 0, 0, start
        if segment.after is not None:
            shared, shared_row, kv_row = segment.position // block, starts[segment.after], start - segment.position
        elif segment.position:  # in a cache, whose first row is the sequence's
            kv_row = 0
        for at in range(0, segment.length, tile.block_q):
            length = min(tile.block_q, segment.length - at)
            tiles.append((segment.first + at, length, segment.position + at, kv_row, shared, shared_row))
    tiles.sort(key=lambda t: t[2] + t[1], reverse=True)
    copies = np.array(copies, np.int32).reshape(-1, 2)
    return Layout(np.array(tiles, np.int32), rows, np.concatenate(row_of), copies)
