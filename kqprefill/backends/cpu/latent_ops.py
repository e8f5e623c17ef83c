"""Multi-head latent attention in NumPy float32 (arXiv 2405.04434): each head's keys and values are made of latent rows,
and attended to as any."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import Float32Array
from ...models.config import Rope
from ...models.latent import LatentAttention
from ...models.weights import Weights
from .collector import HearingOps
from .functions import attention_tasks, multiply
from .steady import multiply_by_place, steady_attention_tasks
from .threads import blas, in_parallel
from .weights import DecodedWeights


class LatentOps(HearingOps):
    """Latent attention, of the other ops of a batch."""

    cache: Any  # CpuCache | None
    _weights: DecodedWeights
    _steady: bool  # whether bits may not depend on how a prompt is cut

    @abstractmethod
    def _multiply(self, a: Float32Array, matrix: Float32Array, batch_rows: NDArray[Any], out: Float32Array) -> None:
        """a · matrixᵀ, to out; batch_rows: which rows of the batch a's are."""

    @abstractmethod
    def _rotate(self, x: Float32Array, rope: Rope) -> Float32Array:
        """Heads [T, heads, D], their first elements rotated."""

    def latent_attention(
        self, h: Float32Array, w: Weights, latent: LatentAttention, *, rope: Rope | None, scale: float
    ) -> Float32Array:
        q = self._latent_queries(h, w, latent, rope)
        both = self.linear(h, w.attn_kv_a_mqa)
        c = self.norm(both[:, : latent.rank], w.attn_kv_a_norm)
        k_r = both[:, latent.rank :]
        if rope is not None:
            k_r = self._rotate(k_r[:, None], rope)[:, 0]
        matrix = _decompressor(w, latent, self._weights)
        if self.cache is None:
            self.enter("linear", latent.decompressing(w), len(h))
            made = np.empty((len(h), len(matrix)), np.float32)
            self._multiply(c, matrix, np.arange(len(h)), made)
            k, v = _keys_values(made, k_r, latent)
            if self.collector is not None:
                self._tell_decompression(w, latent, rope, (q, k, c), scale)
            attended: Float32Array = self.attention(q, k, v, scale=scale)
            return attended
        (segment,) = self.batch.segments  # a cache is one sequence's
        end, kept = segment.position + segment.length, self.cache.rows[self.layer]
        for rows, new in zip(kept, (c, k_r)):
            rows[segment.position : end] = new
        self.enter("linear", latent.decompressing(w), end)
        made = np.empty((end, len(matrix)), np.float32)
        if self._steady:
            multiply_by_place(kept[0][:end], matrix, np.arange(end), made)
        else:
            multiply(kept[0][:end], matrix, [0, end], made)
        k, v = _keys_values(made, kept[1][:end], latent)
        self.enter_attention(latent.head_dim, latent.value_dim, None)
        out = np.empty((len(h), latent.heads, latent.value_dim), np.float32)
        tasks = steady_attention_tasks if self._steady else partial(attention_tasks, parts=blas().threads)
        in_parallel(tasks(q, k, v, out, segment.position, scale, None, None, None))
        return out.reshape(len(h), -1)

    def _tell_decompression(
        self,
        w: Weights,
        latent: LatentAttention,
        rope: Rope | None,
        qkc: tuple[Float32Array, Float32Array, Float32Array],
        scale: float,
    ) -> None:
        """Let the collector hear what is multiplied by the matrices that make keys and values, as llama.cpp multiplies
        (llama.cpp, src/models/deepseek2.cpp): where there are two, queries by attn_k_b, and by attn_v_b what attention
        makes of the latent rows."""
        q, k, c = qkc
        if latent.joined:
            self.hear(w.attn_kv_b_weight, c)
            return
        still = q[..., : latent.key_dim]
        if rope is not None and rope.beta:
            still = still / rope.temperature(self.batch.positions).astype(np.float32)[:, None, None]
        self.hear(w.attn_k_b_weight, np.ascontiguousarray(still).reshape(len(q), -1))
        values = np.broadcast_to(c[:, None], (len(c), latent.heads, latent.rank))
        self.hear(w.attn_v_b_weight, self.attention(q, k, values, scale=scale))

    def _latent_queries(self, h: Float32Array, w: Weights, latent: LatentAttention, rope: Rope | None) -> Float32Array:
        """[T, heads, head_dim]: of each head what is not rotated, then what is."""
        if latent.query_rank:
            q = self.linear(self.norm(self.linear(h, w.attn_q_a), w.attn_q_a_norm), w.attn_q_b)
        else:
            q = self.linear(h, w.attn_q)
        queries: Float32Array = q.reshape(len(h), latent.heads, -1)
        if rope is None:
            return queries
        still, turned = np.split(queries, [latent.key_dim], axis=-1)
        queries = np.concatenate([still, self._rotate(turned, rope)], axis=-1)
        if rope.beta:
            queries *= rope.temperature(self.batch.positions).astype(np.float32)[:, None, None]
        return queries


def _decompressor(w: Weights, latent: LatentAttention, weights: DecodedWeights) -> Float32Array:
    """The matrix [heads * (key_dim + value_dim), rank] that makes keys and values: of each head the key's rows, then
    the value's, in whichever form the file has them."""
    decoded = [weights.rows(weight.tensor, 0, weight.shape[0]) for weight in latent.decompressing(w)]
    if latent.joined:
        return decoded[0]
    k_b, v_b = decoded
    return np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1).reshape(-1, latent.rank)


def _keys_values(made: Float32Array, k_r: Float32Array, latent: LatentAttention) -> tuple[Float32Array, Float32Array]:
    """Keys [S, heads, head_dim] and values [S, heads, value_dim], of what the decompressor makes of latent rows, [S,
    heads * (key_dim + value_dim)], and of k_r [S, rotary]."""
    heads = made.reshape(len(made), latent.heads, -1)
    shared = np.broadcast_to(k_r[:, None], (len(made), latent.heads, latent.rotary))
    return np.concatenate([heads[..., : latent.key_dim], shared], axis=-1), heads[..., latent.key_dim :]
