"""The reference ops of Gemma 4: heads whose size differs by layer, keys and values that layers share, embeddings for
each layer."""

from __future__ import annotations

from abc import abstractmethod
import math

import numpy as np

from ...core import Float32Array
from ...gguf import dequantize
from ...models.config import Rope
from ...models.ops import Ops
from ...models.weights import Weight
from .functions import GATES


class PerLayerOps(Ops):
    """Ops that are made of others, in NumPy float32."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Float32Array, Float32Array]] = {}  # keys and values by their layer
        self._for_layers: Float32Array | None = None  # [T, layers, P]

    @abstractmethod
    def _rotate(self, x: Float32Array, rope: Rope) -> Float32Array: ...

    def normed_heads(
        self,
        h: Float32Array,
        weight: Weight,
        head_dim: int,
        norm: Weight | None = None,
        rope: Rope | None = None,
    ) -> Float32Array:
        rows: Float32Array = self.linear(h, weight).reshape(len(h), -1, head_dim)
        if norm is not None:
            rows = self.rms_norm(rows, norm)
        else:
            mean_square = np.mean(np.square(rows), axis=-1, keepdims=True)
            rows = rows / np.sqrt(mean_square + np.float32(self.config.rms_epsilon))
        return rows if rope is None else self._rotate(rows, rope)

    def keep(self, k: Float32Array, v: Float32Array) -> None:
        self._kept[self.layer] = k, v

    def attention_over(self, layer: int, q: Float32Array, *, scale: float, window: int | None = None) -> Float32Array:
        # The cache's arrays are that layer's, which are written once more with what they hold.
        k, v = self._kept[layer]
        attended: Float32Array = self.attention(q, k, v, scale=scale, window=window)
        return attended

    def embed_for_layers(self, x: Float32Array, table: Weight, matrix: Weight, norm: Weight) -> None:
        (width,) = norm.shape
        own = self.embed(table, scale=math.sqrt(width)).reshape(len(x), -1, width)
        made = self.linear(x, matrix, scale=1 / math.sqrt(x.shape[1])).reshape(own.shape)
        self._for_layers = (own + self.rms_norm(made, norm)) / np.float32(math.sqrt(2))

    def gated_embedding(self, x: Float32Array, gate: Weight) -> Float32Array:
        assert self._for_layers is not None, "embed_for_layers comes first"
        return GATES["gelu_tanh"](self.linear(x, gate), self._for_layers[:, self.layer])

    def scaled_by(self, x: Float32Array, weight: Weight) -> Float32Array:
        scaled: Float32Array = x * dequantize(weight.tensor.data, weight.tensor.type)
        return scaled
