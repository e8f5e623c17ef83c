"""Products and attention whose bits of a token do not depend on how a prompt is cut: for what is rounded afterwards,
and for who asks for it.

What rounds to one integer or the next by its last digit would otherwise make other results of other last digits, as far
apart as rounded results are from exact ones. What BLAS makes of a row depends on a product's sizes and on the row's
place in it, not on what the other rows hold. So products have fixed sizes here, and a token's place in them is that of
its position; keys are walked in blocks that begin at fixed positions, and what a block does not have is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...core import LARGEST_KEY_BLOCK, Float32Array
from .functions import hidden_keys, seen_keys, softcapped
from .threads import in_parallel

_ROWS = 32  # of a product
_TILE_ROWS = 512  # of a matrix that are multiplied by at a time
_AT_ONCE = 64  # products, for whose rows there is memory


def multiply_by_place(a: Float32Array, matrix: Float32Array, positions: NDArray[np.integer], out: Float32Array) -> None:
    """a · matrixᵀ, [T, columns] by [rows, columns], to out [T, rows], on all cores; positions [T]: the tokens'."""
    place = positions % _ROWS
    by_place = np.argsort(place, kind="stable")
    firsts = np.searchsorted(place[by_place], np.arange(_ROWS))
    product = np.empty(len(a), np.intp)  # which each token is in: the first that has its place free
    product[by_place] = np.arange(len(a)) - firsts[place[by_place]]
    for begin in range(0, int(product.max()) + 1, _AT_ONCE):
        chosen = np.flatnonzero((product >= begin) & (product < begin + _AT_ONCE))
        where = product[chosen] - begin, place[chosen]
        rows = np.zeros((int(where[0].max()) + 1, _ROWS, a.shape[1]), np.float32)
        rows[where] = a[chosen]
        tiles = (slice(at, at + _TILE_ROWS) for at in range(0, len(matrix), _TILE_ROWS))
        in_parallel([partial(_multiply_tile, rows, matrix, where, out, chosen, tile) for tile in tiles])


def _multiply_tile(
    rows: Float32Array,
    matrix: Float32Array,
    where: tuple[NDArray[np.intp], NDArray[np.integer]],
    out: Float32Array,
    to: NDArray[np.intp],
    tile: slice,
) -> None:
    """Products [n, rows of a product, columns] by some rows of a matrix; what is at `where` goes to these rows of
    out."""
    out[to, tile] = np.matmul(rows, matrix[tile].T)[where]


def steady_attention_tasks(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    out: Float32Array,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float32Array | None,
    both_ways: bool = False,
    chunked: bool = False,
) -> list[Callable[[], None]]:
    """As `functions.attention_tasks`, a task for each block of queries."""
    n, heads, head_dim = q.shape
    total, nkv, _ = k.shape
    group, before = heads // nkv, start % _ROWS
    blocks = -(-(before + n) // _ROWS)
    queries = np.zeros((blocks * _ROWS, heads, head_dim), np.float32)
    queries[before : before + n] = q
    queries = np.ascontiguousarray(queries.reshape(blocks, _ROWS, nkv, group, -1).transpose(0, 2, 3, 1, 4))
    keys = np.ascontiguousarray(_key_blocks(k).transpose(2, 0, 3, 1))  # [nkv, blocks, D, keys of a block]
    values = np.ascontiguousarray(_key_blocks(v).transpose(2, 0, 1, 3))  # [nkv, blocks, keys of a block, Dv]
    sink = None if sinks is None else sinks.reshape(nkv, group, 1, 1, 1)

    def attend(number: int) -> None:
        begin = start - before + number * _ROWS
        end = begin + _ROWS
        first, last = seen_keys(begin, end, total, window, both_ways, chunked)
        used = slice(first // LARGEST_KEY_BLOCK, -(-last // LARGEST_KEY_BLOCK))
        first, last = used.start * LARGEST_KEY_BLOCK, used.stop * LARGEST_KEY_BLOCK
        scores = softcapped(queries[number][:, :, None] @ keys[:, None, used] * np.float32(scale), softcap)
        hidden = hidden_keys(begin, end, first, last, window, both_ways, chunked)
        hidden |= np.arange(first, last) >= total
        scores.transpose(0, 1, 3, 2, 4)[..., hidden.reshape(_ROWS, -1, LARGEST_KEY_BLOCK)] = -np.inf
        largest = scores.max(axis=(2, 4), keepdims=True)
        largest = largest if sink is None else np.maximum(largest, sink)
        scores -= largest
        np.exp(scores, out=scores)
        sums = scores.sum(axis=-1, keepdims=True)  # each block's
        whole = np.zeros_like(largest) if sink is None else np.exp(sink - largest)
        for block in range(sums.shape[2]):
            whole += sums[:, :, block, None]
        scores /= whole
        attended = np.zeros((nkv, group, _ROWS, values.shape[-1]), np.float32)
        for block in range(sums.shape[2]):
            attended += scores[:, :, block] @ values[:, used.start + block, None]
        own = slice(max(begin, start) - begin, min(end, start + n) - begin)
        made = attended[:, :, own].transpose(2, 0, 1, 3)
        out[max(begin, start) - start : min(end, start + n) - start] = made.reshape(-1, heads, values.shape[-1])

    return [partial(attend, number) for number in range(blocks)]


def _key_blocks(x: Float32Array) -> Float32Array:
    """Keys or values [S, heads, D] in blocks, [blocks, keys of a block, heads, D], the last filled up with zeros."""
    blocks = -(-len(x) // LARGEST_KEY_BLOCK)
    whole = np.zeros((blocks * LARGEST_KEY_BLOCK, *x.shape[1:]), np.float32)
    whole[: len(x)] = x
    return whole.reshape(blocks, LARGEST_KEY_BLOCK, *x.shape[1:])
