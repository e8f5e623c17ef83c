"""Queries, keys and values, and attention over them, in NumPy float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...core import Float32Array, LayerState, SharedKeysValues
from ...models.config import Rope
from ...models.ops import Ops
from ...models.weights import Weight
from .functions import attention_tasks, normalised, sigmoid, vector_of
from .steady import steady_attention_tasks
from .threads import blas, in_parallel

_SMALL_SCORES = 1 << 20  # attention scores of a segment that one thread computes, beside others' segments

HeadRows = tuple[Float32Array, Float32Array, Float32Array]


class AttentionOps(Ops):
    """Part of CpuOps."""

    cache: Any  # CpuCache | None
    _steady: bool  # whether bits may not depend on how a prompt is cut

    def __init__(self, layer_states: Sequence[LayerState]) -> None:
        self._layer_states = layer_states
        self._keys_values: dict[int, tuple[Float32Array, Float32Array]] = {}  # of the layers that have been through
        self._rotations: dict[int, tuple[Float32Array, ...]] = {}  # (cos, sin) by the id of their Rope

    def qkv(
        self,
        h: Float32Array,
        wq: Weight,
        wk: Weight | None,
        wv: Weight | None,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
        v_normed: bool = False,
        normed_last: bool = False,
    ) -> HeadRows:
        head_dim = wq.shape[0] // self.config.head_count
        q = self._head_rows(self.linear(h, wq), head_dim, q_norm, rope, normed_last)
        if rope is not None and rope.beta:
            q *= rope.temperature(self.batch.positions).astype(np.float32)[:, None, None]
        if wk is None:
            return q, *self._layer_keys_values()
        keys = self.linear(h, wk)
        v = (keys if wv is None else self.linear(h, wv)).reshape(len(h), -1, head_dim)
        if v_normed:
            v = normalised(v, self.config.norm_epsilon)
        k = self._head_rows(keys, head_dim, k_norm, rope, normed_last)
        self._keys_values[self.layer] = k, v
        return q, k, v

    def _layer_keys_values(self) -> tuple[Float32Array, Float32Array]:
        """Those of the layer that this one's state names."""
        state = self._layer_states[self.layer]
        assert isinstance(state, SharedKeysValues), "a layer without keys and values of its own"
        # Its cached ones are that layer's arrays, which are written once more with what they hold.
        return self._keys_values[state.layer]

    def _head_rows(
        self, x: Float32Array, head_dim: int, norm: Weight | None, rope: Rope | None, normed_last: bool = False
    ) -> Float32Array:
        """What a matrix has made, as heads [T, heads, head_dim], normalised and rotated."""
        if norm is not None and not normed_last:
            rows = norm.shape if len(norm.shape) == 2 else (-1, *norm.shape)
            x = self.norm(x.reshape(len(x), *rows), norm)
        x = x.reshape(len(x), -1, head_dim)
        x = x if rope is None or not rope.width else self._rotate(x, rope)
        if not normed_last:
            return x
        return normalised(x, self.config.norm_epsilon) if norm is None else self.norm(x, norm)

    def gated_qkv(
        self,
        h: Float32Array,
        wq: Weight,
        wk: Weight,
        wv: Weight,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
    ) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
        head_dim = wq.shape[0] // self.config.head_count // 2
        both = self.linear(h, wq).reshape(len(h), -1, 2, head_dim)
        q, k = (
            self._head_rows(x, head_dim, n, rope) for x, n in ((both[:, :, 0], q_norm), (self.linear(h, wk), k_norm))
        )
        return q, k, self.linear(h, wv).reshape(len(h), -1, head_dim), both[:, :, 1]

    def gated(self, a: Float32Array, gate: Float32Array) -> Float32Array:
        result: Float32Array = a * sigmoid(gate).reshape(len(a), -1)
        return result

    def _rotate(self, x: Float32Array, rope: Rope) -> Float32Array:
        self.enter("rest")
        if id(rope) not in self._rotations:
            angle = self.batch.positions[:, None] * rope.inv_freq  # float64: positions can be large
            exact = np.cos(angle) * rope.magnitude, np.sin(angle) * rope.magnitude
            self._rotations[id(rope)] = tuple(a.astype(np.float32)[:, None, :] for a in exact)
        cos, sin = self._rotations[id(rope)]
        width = rope.width
        if rope.interleaved:
            first, second = slice(0, width, 2), slice(1, width, 2)
        else:
            first, second = slice(0, width // 2), slice(width // 2, width)
        a, b = x[..., first], x[..., second]
        out: Float32Array = x.copy()
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        return out

    def attention(
        self,
        q: Float32Array,
        k: Float32Array,
        v: Float32Array,
        *,
        scale: float,
        window: int | None = None,
        chunked: bool = False,
        softcap: float | None = None,
        sinks: Weight | None = None,
        both_ways: bool = False,
    ) -> Float32Array:
        self.enter_attention(q.shape[2], v.shape[2], window)
        out = np.empty((*q.shape[:2], v.shape[2]), np.float32)
        small: list[Callable[[], None]] = []  # of segments that one thread computes, beside others
        for segment in self.batch.segments:
            keys, values, end = k[segment.rows], v[segment.rows], segment.position + segment.length
            if self.cache is not None:
                cached_keys, cached_values = self.cache.rows[self.layer]
                cached_keys[segment.position : end], cached_values[segment.position : end] = keys, values
                keys, values = cached_keys[:end], cached_values[:end]
            elif segment.after is not None:
                before = self.batch.segments[segment.after].rows
                keys, values = np.concatenate([k[before], keys]), np.concatenate([v[before], values])
            sink = None if sinks is None else vector_of(sinks.tensor)
            is_small = segment.length * end * q.shape[1] < _SMALL_SCORES
            exact = partial(attention_tasks, parts=1 if is_small else blas().threads)
            tasks = (steady_attention_tasks if self._steady else exact)(
                q[segment.rows],
                keys,
                values,
                out[segment.rows],
                segment.position,
                scale,
                window,
                softcap,
                sink,
                both_ways=both_ways,
                chunked=chunked,
            )
            if is_small:
                small += tasks
            else:
                in_parallel(tasks)
        in_parallel(small)
        return out.reshape(len(q), -1)
