"""The ops in NumPy float32: the oracle that the CUDA kernels are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import (
    NO_RESULT,
    Batch,
    Float32Array,
    HeadResult,
    KeysValues,
    Latent,
    LayerState,
    Logits,
    PendingHead,
    Recurrent,
    SharedKeysValues,
    Vectors,
)
from ...gguf import dequantize
from ...models.experts import Experts
from ...models.family import Family
from ...models.precision import Precision, takes_int8
from ...models.weights import Weight, Weights
from ..base import Cache
from .altup_ops import AltUpOps
from .attention_ops import AttentionOps
from .functions import (
    ACTIVATIONS,
    GATES,
    LEAST_SUM,
    best_experts,
    multiply,
    normalised,
    ranks_of,
    sigmoid,
    softcapped,
    softmax,
    vector_of,
)
from .int8 import Rounded, in_blocks, multiply_rounded
from .latent_ops import LatentOps
from .recurrent_ops import RecurrentOps, State, first_state
from .steady import multiply_by_place
from .weights import DecodedWeights

_MATRIX_PIECE, _MATRIX_ROWS = 1 << 25, 1 << 13  # elements (128 MB), and rows, of a matrix that are decoded at once


class CpuCache(Cache):
    """rows: of a layer's tokens two arrays: keys and values, float32 [capacity, heads, head_dim] each, or the two parts
    of latent rows, [capacity, rank] and [capacity, rotary]. recurrences: a layer's recurrent_ops.State."""

    def __init__(self, states: Sequence[LayerState], capacity: int) -> None:
        super().__init__(capacity)
        self.rows: dict[int, tuple[Float32Array, Float32Array]] = {}
        self.recurrences: dict[int, State] = {}
        for layer, part in ((layer, part) for layer, state in enumerate(states) for part in state.parts):
            if isinstance(part, SharedKeysValues):
                self.rows[layer] = self.rows[part.layer]
            elif isinstance(part, Recurrent):
                self.recurrences[layer] = first_state(part)
            elif isinstance(part, (KeysValues, Latent)):
                self.rows[layer] = _rows(part, capacity)
            else:
                raise TypeError(f"the CPU keeps no state of kind {type(part).__name__}")

    def close(self) -> None:
        self.rows.clear()
        self.recurrences.clear()


def _rows(state: KeysValues | Latent, capacity: int) -> tuple[Float32Array, Float32Array]:
    if isinstance(state, Latent):
        return np.empty((capacity, state.rank), np.float32), np.empty((capacity, state.rotary), np.float32)
    shape = capacity, state.heads, state.head_dim
    return np.empty(shape, np.float32), np.empty(shape, np.float32)


class CpuOps(AttentionOps, LatentOps, RecurrentOps, AltUpOps):
    """The operations of one batch; every array is float32."""

    cache: CpuCache | None

    def __init__(
        self,
        family: Family,
        batch: Batch,
        cache: CpuCache | None,
        weights: DecodedWeights | None = None,
        precision: Precision = "exact",
        steady: bool = False,
    ) -> None:
        """weights: the model's, kept between batches; None where nothing is kept. precision: what matrices are
        multiplied as. steady: whether bits may not depend on how a prompt is cut or packed; in int8 they never may."""
        super().__init__(family.layer_states)
        self._precision = precision
        self._steady, self._positions = steady or precision != "exact", batch.positions
        self.config, self.batch, self.cache = family.config, batch, cache
        self._weights = DecodedWeights(room=0) if weights is None else weights
        # What BLAS makes of a row depends on how many rows there are: each segment is multiplied by itself, so that it
        # has the same bits in any batch.
        self._segment_of = np.repeat(np.arange(len(batch.segments)), [s.length for s in batch.segments])

    def embed(self, weight: Weight, scale: float = 1.0) -> Float32Array:
        self.enter("rest")
        x: Float32Array = dequantize(weight.tensor.data[self.batch.tokens], weight.tensor.type) * np.float32(scale)
        return x

    def norm(self, x: Float32Array, weight: Weight) -> Float32Array:
        self.enter("rest")
        centred = x - x.mean(axis=-1, keepdims=True) if self.config.layer_norm else x
        normed: Float32Array = normalised(centred, self.config.norm_epsilon) * vector_of(weight.tensor)
        return normed if weight.bias is None else normed + vector_of(weight.bias)

    def cast(self, x: Float32Array) -> Float32Array:
        return x

    def add_rms_norm(
        self, x: Float32Array, y: Float32Array, weight: Weight, factor: Weight | float | None = None
    ) -> Float32Array:
        added = x + self.norm(y, weight)
        if factor is None:
            return added
        return added * (np.float32(factor) if isinstance(factor, float) else vector_of(factor.tensor))

    def add_norm_of_norms(
        self,
        x: Float32Array,
        y: Float32Array,
        y_norm: Weight,
        z: Float32Array,
        z_norm: Weight,
        weight: Weight,
        factor: Weight | None,
    ) -> Float32Array:
        return self.add_rms_norm(x, self.norm(y, y_norm) + self.norm(z, z_norm), weight, factor)

    def linear(
        self,
        a: Float32Array,
        weight: Weight,
        residual: Float32Array | None = None,
        scale: float = 1.0,
        batch_rows: NDArray[np.intp] | None = None,
    ) -> Float32Array:
        """As Ops.linear; batch_rows: which rows of the batch a's are, ascending, where they are not all of them."""
        self.hear(weight, a)
        return self._linear(a, weight, residual, scale, batch_rows)

    def projected(self, a: Float32Array, weight: Weight) -> Float32Array:
        return self.linear(a, weight)

    def _linear(
        self,
        a: Float32Array,
        weight: Weight,
        residual: Float32Array | None,
        scale: float,
        batch_rows: NDArray[np.intp] | None,
    ) -> Float32Array:
        """As `linear`, of an input that the collector hears of elsewhere."""
        self.enter("linear", [weight], len(a))
        out = np.empty((len(a), weight.shape[0]), np.float32)
        x = Rounded.of(a) if self._precision == "int8" and takes_int8(weight) else a
        for piece in _pieces(weight):
            self._product(
                x, weight, piece, scale, np.arange(len(a)) if batch_rows is None else batch_rows, out[:, piece]
            )
        if residual is not None:
            out += residual
        return out

    def _product(
        self,
        a: Float32Array | Rounded,
        weight: Weight,
        piece: slice,
        scale: float,
        batch_rows: NDArray[Any],
        out: Float32Array,
    ) -> None:
        """scale * (a · Wᵀ + bias), of a piece of the matrix's rows, to out; of a Rounded in int8."""
        if isinstance(a, Rounded):
            multiply_rounded(a, self._weights.rounded(weight.tensor, piece.start, piece.stop), out)
        else:
            self._multiply(a, self._weights.rows(weight.tensor, piece.start, piece.stop), batch_rows, out)
        if weight.bias is not None:
            out += vector_of(weight.bias)[piece]
        if scale != 1.0:
            out *= np.float32(scale)

    def _multiply(self, a: Float32Array, matrix: Float32Array, batch_rows: NDArray[Any], out: Float32Array) -> None:
        if self._steady:
            multiply_by_place(a, matrix, self._positions[batch_rows], out)
            return
        cuts = np.flatnonzero(np.diff(self._segment_of[batch_rows])) + 1
        multiply(a, matrix, [0, *cuts, len(a)], out)

    def mlp(
        self,
        h: Float32Array,
        gate: Weight | None,
        up: Weight,
        down: Weight,
        *,
        activation: str,
        residual: Float32Array | None = None,
        scale: float = 1.0,
        sparsity: float | None = None,
        batch_rows: NDArray[np.intp] | None = None,
    ) -> Float32Array:
        """As Ops.mlp; batch_rows as in `linear`."""
        if gate is None:
            hidden = ACTIVATIONS[activation](self.linear(h, up, batch_rows=batch_rows))
        else:
            gates, ups = (self.linear(h, weight, batch_rows=batch_rows) for weight in (gate, up))
            if sparsity is not None:
                least = gates.mean(axis=-1) + np.float32(sparsity) * gates.std(axis=-1, ddof=1)
                gates = np.maximum(gates - least[:, None], np.float32(0))
            hidden = GATES[activation](gates, ups)
        return self.linear(hidden, down, residual, scale, batch_rows)

    def router_scores(self, x: Float32Array, norm: Weight, router: Weight, scale: float) -> Float32Array:
        normed = self.norm(x, norm)
        if self.collector is not None:
            self.hear(router, normed * np.float32(scale))
        return self._linear(normed, router, None, scale, None)

    def moe(
        self,
        h: Float32Array,
        w: Weights,
        experts: Experts,
        *,
        activation: str,
        residual: Float32Array | None = None,
        scores: Float32Array | None = None,
        shared: tuple[Float32Array, Weight] | None = None,
    ) -> Float32Array:
        out = np.zeros_like(h) if residual is None else residual.copy()
        if shared is not None:
            self.hear(shared[1], h)
            out += shared[0] * sigmoid((h * vector_of(shared[1].tensor)).sum(axis=-1))[:, None]
        if scores is None:
            scores = self.linear(h, w.ffn_gate_inp)
        chosen_by = scores
        if experts.sigmoid:
            scores = sigmoid(scores)
        elif not experts.routed_after:
            scores = softmax(scores)
        bias = w.get("exp_probs_b_bias")
        if not experts.weighs_input:
            chosen_by = scores if bias is None else scores + vector_of(bias.tensor)
        used = best_experts(chosen_by, experts)
        shares = np.take_along_axis(scores, used, axis=-1)
        if experts.routed_after:
            shares = softmax(shares)
        if experts.normalise:
            shares /= np.maximum(shares.sum(axis=-1, keepdims=True), LEAST_SUM)
        if experts.scale != 1.0:
            shares *= np.float32(experts.scale)
        of_outputs = w.get("ffn_down_exps_scale")
        if of_outputs is not None:
            shares *= vector_of(of_outputs.tensor)[used]
        stacks = w.ffn_gate_exps if experts.gated else None, w.ffn_up_exps, w.ffn_down_exps
        for expert in np.unique(used):
            tokens, slot = np.nonzero(used == expert)
            gate, up, down = (stack and stack.expert(expert) for stack in stacks)
            assert up is not None and down is not None, "an expert has at least two matrices"
            own, share = h[tokens], shares[tokens, slot, None]
            if experts.weighs_input:
                own, share = own * share, np.float32(1)
            made = self.mlp(own, gate, up, down, activation=activation, batch_rows=tokens)
            if self._precision == "int8" and takes_int8(down):
                made = in_blocks(made)
            out[tokens] += share * made
        return out

    def pool(self, x: Float32Array, norm: Weight) -> PendingHead:
        normed = self.norm(x, norm)
        rows = self.batch.pooled_rows
        values = np.array([normed[first:end].mean(axis=0, dtype=np.float64) for first, end in rows], np.float32)
        return lambda: Vectors(values)

    def head(
        self,
        x: Float32Array,
        norm: Weight,
        output: Weight,
        logits: Logits,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> PendingHead:
        if self.collector is not None:
            self.hear(output, self.norm(x, norm))
            return lambda: NO_RESULT
        targets = self.batch.targets
        if targets is not None and logits in ("ranks", "rows"):
            rows: NDArray[Any] = targets.rows
        else:
            rows = np.arange(len(x) - self.batch.count(logits), len(x))
        self.enter("head", [output], len(rows))
        normed = self.norm(x[rows], norm)

        def logits_of(piece: slice, out: Float32Array) -> Float32Array:
            self._product(normed, output, piece, scale, rows, out)
            return softcapped(out, softcap)

        if targets is not None and logits == "ranks":
            pieces = _pieces(output)
            parts = ((p.start, logits_of(p, np.empty((len(rows), p.stop - p.start), np.float32))) for p in pieces)
            ranks = ranks_of(parts, targets)
            return lambda: ranks
        scores = np.empty((len(rows), output.shape[0]), np.float32)
        for piece in _pieces(output):
            scores[:, piece] = logits_of(piece, scores[:, piece])
        last = scores[-1]
        token = int(np.argmax(last))  # the lowest of equals; of NaN, where there are any
        shifted = last.astype(np.float64) - float(last[token])
        kept = None if logits is None else last if logits == "last" else scores
        result = HeadResult(token, float(last[token]), -math.log(np.exp(shifted).sum()), kept)
        return lambda: result


def _pieces(weight: Weight) -> Iterator[slice]:
    """The rows of a matrix, as many at once as are decoded at once."""
    rows, columns = weight.shape
    step = max(1, min(_MATRIX_PIECE // columns, _MATRIX_ROWS))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))
