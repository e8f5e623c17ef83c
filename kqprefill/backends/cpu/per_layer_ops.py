"""The reference ops of Gemma 4's small models: embeddings for each layer."""

from __future__ import annotations

import math

import numpy as np

from ...core import Float32Array
from ...models.ops import Ops
from ...models.weights import Weight
from .functions import GATES


class PerLayerOps(Ops):
    """Ops that are made of others, in NumPy float32."""

    _embeddings: Float32Array | None = None  # [T, layers, P]

    def embed_for_layers(self, x: Float32Array, table: Weight, matrix: Weight, norm: Weight) -> None:
        (width,) = norm.shape
        own = self.embed(table, scale=math.sqrt(width)).reshape(len(x), -1, width)
        made = self.linear(x, matrix, scale=1 / math.sqrt(x.shape[1])).reshape(own.shape)
        self._embeddings = (own + self.norm(made, norm)) / np.float32(math.sqrt(2))

    def layer_embeddings(self) -> Float32Array:
        """This layer's, [T, P]."""
        assert self._embeddings is not None, "embed_for_layers comes first"
        return self._embeddings[:, self.layer]

    def add_gated_embedding(
        self, x: Float32Array, gate: Weight, matrix: Weight, norm: Weight, factor: Weight | None
    ) -> Float32Array:
        gated = GATES["gelu_tanh"](self.linear(x, gate), self.layer_embeddings())
        added: Float32Array = self.add_rms_norm(x, self.linear(gated, matrix), norm, factor)
        return added
