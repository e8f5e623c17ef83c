"""The reference ops of Gemma 3n: several residual streams (AltUp, arXiv 2301.13310), float32 [streams, T, H]."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import Float32Array
from ...models.weights import Weight, Weights
from .functions import GATES, vector_of
from .per_layer_ops import PerLayerOps
from .weights import DecodedWeights


class AltUpOps(PerLayerOps):
    """Ops that are made of others."""

    _weights: DecodedWeights

    @abstractmethod
    def _multiply(self, a: Float32Array, matrix: Float32Array, batch_rows: NDArray[Any], out: Float32Array) -> None:
        """a · matrixᵀ, to out; batch_rows: which rows of the batch a's are."""

    def altup_streams(self, x: Float32Array, matrices: Weight) -> Float32Array:
        made = (self._by_one(x, matrices, number) for number in range(matrices.shape[0]))
        return np.stack([x, *(_as_long_as(x, own) for own in made)])

    def altup_predict(self, x: Float32Array, w: Weights) -> tuple[Float32Array, Float32Array]:
        streams = len(x)
        c = self._mixed(x[0], w, w.altup_predict_coef).reshape(-1, streams, streams)
        predicted = x.copy()
        for to in range(streams):
            for source in range(streams):
                predicted[to] += c[:, to, source, None] * x[source]
        return predicted, predicted[0].copy()

    def altup_correct(self, x: Float32Array, made: Float32Array, w: Weights) -> Float32Array:
        c = self._mixed(made, w, w.altup_correct_coef) + np.float32(1)
        corrected: Float32Array = x + c.T[:, :, None] * (made - x[0])
        first = corrected[0] * vector_of(w.altup_correct_scale.tensor)
        gated = GATES["gelu_tanh"](self.linear(first, w.inp_gate), self.layer_embeddings())
        corrected[1:] += self.norm(self.linear(gated, w.proj), w.post_norm)
        return corrected

    def altup_merge(self, x: Float32Array, matrices: Weight) -> Float32Array:
        total: Float32Array = x[0].copy()
        for number in range(matrices.shape[0]):
            total += _as_long_as(x[0], self._by_one(x[1 + number], matrices, number))
        total /= np.float32(len(x))
        return total

    def _by_one(self, x: Float32Array, stack: Weight, number: int) -> Float32Array:
        """x through one matrix of a stack; no collector hears of these few."""
        tensor = stack.expert(number).tensor
        made = np.empty((len(x), tensor.shape[0]), np.float32)
        self._multiply(x, self._weights.rows(tensor, 0, tensor.shape[0]), np.arange(len(x)), made)
        return made

    def _mixed(self, x: Float32Array, w: Weights, matrix: Weight) -> Float32Array:
        """The coefficients that a matrix [n, streams] makes of x."""
        routed = self.linear(self.norm(x, w.altup_router_norm), w.altup_router, scale=1 / x.shape[1])
        coefficients: Float32Array = (np.tanh(routed)[:, None] * vector_of(matrix.tensor)).sum(axis=-1)
        return coefficients


def _as_long_as(x: Float32Array, y: Float32Array) -> Float32Array:
    """Rows of y, stretched to the length of x's."""
    lengths = (np.sqrt(np.square(rows).sum(axis=-1, keepdims=True)) for rows in (x, y))
    wanted, own = lengths
    stretched: Float32Array = y * (wanted / own)
    return stretched
