"""Functions of arrays that the reference ops are made of, in NumPy float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
import math

import numpy as np
from numpy.typing import NDArray

from ...core import Float32Array, Int32Array, Ranks, Targets
from ...gguf import ModelTensor, dequantize
from ...models.experts import Experts
from .threads import in_parallel

_SCORES_PIECE = 1 << 25  # attention scores held at once: 128 MB
# A product of more multiplications is cut into tiles of that many tokens and rows. The tiles decide what BLAS sums
# together, and so the last bits: they depend on the product's sizes alone, never on how many threads there are.
_WHOLE_PRODUCT = 1 << 27
_TILE_TOKENS, _TILE_ROWS = 512, 256


def vector_of(tensor: ModelTensor) -> Float32Array:
    """A vector's values."""
    return dequantize(tensor.data, tensor.type)


def normalised(x: Float32Array, epsilon: float) -> Float32Array:
    """x / sqrt(mean(x²) + epsilon) over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    normed: Float32Array = x / np.sqrt(mean_square + np.float32(epsilon))
    return normed


def softmax(x: Float32Array, sink: Float32Array | None = None) -> Float32Array:
    """In place, over the last axis; sink: one more score, whose share is dropped."""
    largest = x.max(axis=-1, keepdims=True)
    largest = largest if sink is None else np.maximum(largest, sink)
    x -= largest
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True) + (0 if sink is None else np.exp(sink - largest))
    return x


def softcapped(x: Float32Array, softcap: float | None) -> Float32Array:
    """softcap * tanh(x / softcap) (arXiv 2408.00118), or x."""
    return x if softcap is None else np.float32(softcap) * np.tanh(x / np.float32(softcap))


def sigmoid(x: Float32Array) -> Float32Array:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and 1 / inf the 0 it should be
        result: Float32Array = np.float32(1) / (np.float32(1) + np.exp(-x))
    return result


LEAST_SUM = np.float32(2.0**-14)  # of shares that are normalised: the smallest normal half (llama.cpp: build_moe_ffn)


def best_experts(scores: Float32Array, experts: Experts) -> NDArray[np.intp]:
    """Which experts each token uses, [T, used]: those of the highest scores [T, count], the lowest numbers of equals
    first.

    Where experts are in groups, only those of the best groups count: a group is as good as its two best experts
    together (arXiv 2412.19437).
    """
    if experts.groups > 1:
        groups = scores.reshape(len(scores), experts.groups, -1)
        value = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        others = np.argsort(-value, axis=-1, kind="stable")[:, experts.groups_used :]
        scores = groups.copy()
        np.put_along_axis(scores, others[:, :, None], -np.inf, axis=1)
        scores = scores.reshape(len(scores), -1)
    return np.argsort(-scores, axis=-1, kind="stable")[:, : experts.used]


def silu(x: Float32Array) -> Float32Array:
    """x / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and x / inf the 0 it should be
        result: Float32Array = x / (1 + np.exp(-x))
    return result


def _gelu_tanh(x: Float32Array) -> Float32Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: Float32Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return result


def _swiglu_oai(gate: Float32Array, up: Float32Array) -> Float32Array:
    gate, up = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
    with np.errstate(over="ignore"):
        result: Float32Array = gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1)
    return result


# act(gate) * up of gated feed-forward networks (ggml_silu, ggml_gelu, ggml_swiglu_oai).
GATES: dict[str, Callable[[Float32Array, Float32Array], Float32Array]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "swiglu_oai": _swiglu_oai,
}

# act(up) of those without a gate (ggml_gelu; max(x, 0)², arXiv 2109.08668).
ACTIVATIONS: dict[str, Callable[[Float32Array], Float32Array]] = {
    "gelu_tanh": _gelu_tanh,
    "relu_squared": lambda x: np.square(np.maximum(x, np.float32(0))),
}


def multiply(a: Float32Array, matrix: Float32Array, bounds: Sequence[int], out: Float32Array) -> None:
    """a · matrixᵀ, [T, columns] by [rows, columns], to out [T, rows], on all cores.

    What BLAS makes of a row depends on how many rows there are: the segments that `bounds` delimits are multiplied
    each by itself, so that each has the same bits in any batch.
    """
    rows, columns = matrix.shape
    tasks = []
    for begin, end in pairwise(bounds):
        whole = (end - begin + 16) * rows * columns <= _WHOLE_PRODUCT  # reading the matrix takes as long as 16 tokens
        tiles = 1 if whole else -(-rows // _TILE_ROWS)
        height, width = (end - begin, rows) if whole else (_TILE_TOKENS, -(-rows // tiles))
        for top in range(begin, end, height):
            tokens = slice(top, min(top + height, end))
            for left in range(0, rows, width):
                tile = slice(left, left + width)
                tasks.append(partial(np.matmul, a[tokens], matrix[tile].T, out=out[tokens, tile]))
    in_parallel(tasks)


def attention_tasks(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    out: Float32Array,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Float32Array | None,
    parts: int,
    both_ways: bool = False,
    chunked: bool = False,
) -> list[Callable[[], None]]:
    """Ops.attention of one segment's queries [T, nq, D], from position `start` on, over its sequence's keys [S, nkv, D]
    and values [S, nkv, Dv], to out [T, nq, Dv]; as about `parts` tasks, each of some heads."""
    n, heads, _ = q.shape
    nkv = k.shape[1]
    group = heads // nkv
    q, out = (x.reshape(n, nkv, group, -1).transpose(1, 2, 0, 3) for x in (q, out))  # [nkv, group, T, D or Dv]
    k, v = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]  # [nkv, 1, D, S], [nkv, 1, S, Dv]
    sink = None if sinks is None else sinks.reshape(nkv, group, 1, 1)
    step = max(1, _SCORES_PIECE // (heads * (start + n)))

    def attend(kv: slice, own: slice) -> None:
        """Those heads of keys and values, and of each those of its queries' heads."""
        for at in range(0, n, step):
            end = min(at + step, n)
            seen = slice(*seen_keys(start + at, start + end, start + n, window, both_ways, chunked))
            scores = softcapped(q[kv, own, at:end] @ k[kv, ..., seen] * np.float32(scale), softcap)
            hidden = hidden_keys(start + at, start + end, seen.start, seen.stop, window, both_ways, chunked)
            scores[..., hidden] = -np.inf
            out[kv, own, at:end] = softmax(scores, None if sink is None else sink[kv, own]) @ v[kv, :, seen]

    if nkv >= group:
        return [partial(attend, some, slice(None)) for some in _shares(nkv, parts)]
    return [partial(attend, slice(None), some) for some in _shares(group, parts)]


def seen_keys(begin: int, end: int, total: int, window: int | None, both_ways: bool, chunked: bool) -> tuple[int, int]:
    """From which key on, and before which, of `total`, queries at positions from begin on, and before end, see any."""
    first = 0 if window is None else max(0, begin - window + 1)
    if chunked and window is not None:
        first = begin // window * window
    last = total if both_ways else min(end, total)
    if both_ways and window is not None:
        last = min(last, end + window - 1)
    return first, last


def hidden_keys(
    begin: int, end: int, first: int, last: int, window: int | None, both_ways: bool, chunked: bool
) -> NDArray[np.bool_]:
    """Which of the keys from number first on, and before last, queries at positions from begin on, and before end, do
    not see: [queries, keys]."""
    positions = np.arange(begin, end)[:, None]
    behind = positions - np.arange(first, last)
    behind = np.abs(behind) if both_ways else behind
    reach: int | NDArray[np.int64] | None = window
    if chunked and window is not None:
        reach = positions % window + 1
    hidden: NDArray[np.bool_] = behind < 0 if reach is None else (behind < 0) | (behind >= reach)
    return hidden


def _shares(count: int, parts: int) -> list[slice]:
    """0 to count, in at most that many shares, as equal as may be."""
    width = -(-count // parts)
    return [slice(at, at + width) for at in range(0, count, width)]


def ranks_of(parts: Iterable[tuple[int, Float32Array]], targets: Targets) -> Ranks:
    """Ranks from logits that come some columns at a time: (first column, float32 [S, columns])."""
    n, every = len(targets.rows), np.arange(len(targets.rows))
    largest = np.full(n, -np.inf, np.float32)  # of all columns so far
    total = np.zeros(n)  # the sum of their exponentials, relative to the largest
    wanted, best = np.zeros(n), np.empty((n, 0), np.float32)
    best_ids: Int32Array = np.empty((n, 0), np.int32)
    for first, part in parts:
        here = (targets.tokens >= first) & (targets.tokens < first + part.shape[1])
        wanted[here] = part[every[here], targets.tokens[here] - first]
        now = np.maximum(largest, part.max(axis=1))  # NaN stays NaN
        with np.errstate(invalid="ignore"):
            total = total * np.exp(largest - now) + np.exp(part - now[:, None]).sum(axis=1, dtype=np.float64)
        largest = now
        for _ in range(min(targets.top, part.shape[1])):
            token = part.argmax(axis=1)  # the first of equals
            best, best_ids = np.c_[best, part[every, token]], np.c_[best_ids, (first + token).astype(np.int32)]
            part[every, token] = -np.inf
        order = np.argsort(-best, axis=1, kind="stable")[:, : targets.top]  # of equals those of earlier columns first
        best, best_ids = np.take_along_axis(best, order, axis=1), np.take_along_axis(best_ids, order, axis=1)
    base = largest + np.log(total)
    return Ranks((wanted - base).astype(np.float32), best_ids, (best - base[:, None]).astype(np.float32))
