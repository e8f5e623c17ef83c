"""The ops that a family's page calls: what a backend computes for one batch.

Shapes: T tokens in the batch, H embedding_length, F feed_forward_length, V vocab_size, D head_dim, nq and nkv heads.
The residual stream and every op's sums are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
import math
from typing import Any, TypeAlias

import numpy as np

from ..collector import Collector
from ..core import Batch, Logits, PendingHead
from ..timeline import Timeline
from .config import Config, Rope
from .delta_net import DeltaNet
from .experts import Experts
from .kda import KimiDelta
from .latent import LatentAttention
from .mamba2 import Mamba2
from .weights import Weight, Weights

# What ops hand to one another. Each backend has types of its own for them, and a family only hands them on.
Residual: TypeAlias = Any  # the residual stream, float32 [T, H]; good for one op: its storage may be reused
Input: TypeAlias = Any  # what a matrix is multiplied by, [T, columns]
HeadRows: TypeAlias = Any  # q, k or v: [T, heads, D]
Sums: TypeAlias = Any  # what a matrix makes of its input, float32 [T, rows]


class Ops(ABC):
    """The operations of one batch. What an op returns is good until the next layer.

    layer: the layer that is running; it chooses the cache's slice. timeline: a Timeline that hears which stage each op
    belongs to, or None. collector: a Collector that hears the inputs of all products, or None; where it listens, no
    logits are computed.
    """

    config: Config
    batch: Batch
    layer: int = 0
    timeline: Timeline | None = None
    collector: Collector | None = None

    def begin_layer(self, index: int) -> None:
        """The ops that follow are this layer's."""
        self.layer = index
        if self.collector is not None:
            self.collector.begin_layer()

    def enter(self, stage: str, matrices: Sequence[Weight] = (), rows: int = 0, share: float = 1.0) -> None:
        """What follows belongs to this stage: `rows` rows through that share of these matrices, if any."""
        if self.timeline is not None:
            operations = sum(2 * rows * math.prod(w.shape) for w in matrices)
            self.timeline.enter(stage, int(operations * share), sum(w.tensor.nbytes for w in matrices))

    def enter_attention(self, head_dim: int, value_dim: int, window: int | None, alone: bool = False) -> None:
        """What follows is a layer's attention over this batch, with keys and values of so many elements a head; alone:
        of its last position only."""
        if self.timeline is not None:
            seen = self.batch.positions[-1 if alone else 0 :].astype(np.int64) + 1
            seen = seen if window is None else np.minimum(seen, window)
            self.timeline.enter("attention", 2 * self.config.head_count * (head_dim + value_dim) * int(seen.sum()))

    @abstractmethod
    def embed(self, weight: Weight, scale: float = 1.0) -> Residual:
        """x[t] = scale * weight[the batch's token t]: [T, H]."""

    @abstractmethod
    def norm(self, x: Residual, weight: Weight) -> Input:
        """x / sqrt(mean(x²) + eps) * weight + its bias over each row (RMSNorm, arXiv 1910.07467); where
        config.layer_norm says so, of x less its mean (LayerNorm, arXiv 1607.06450): [T, H]."""

    @abstractmethod
    def cast(self, x: Residual) -> Input:
        """The residual stream as it is, for families that normalise only what is added to it (`add_rms_norm`).

        Raises ModelError where something else was added to it: then nothing bounds its values, and a backend with
        operands of half precision could overflow.
        """

    @abstractmethod
    def add_rms_norm(self, x: Residual, y: Sums, weight: Weight, factor: Weight | float | None = None) -> Residual:
        """x + rms_norm(y, weight), times `factor`, a number or a vector of one, where one is given; y may be x."""

    @abstractmethod
    def add_norm_of_norms(
        self, x: Residual, y: Sums, y_norm: Weight, z: Sums, z_norm: Weight, weight: Weight, factor: Weight | None
    ) -> Residual:
        """As `add_rms_norm`, of rms_norm(y, y_norm) + rms_norm(z, z_norm)."""

    @abstractmethod
    def qkv(
        self,
        h: Input,
        wq: Weight,
        wk: Weight | None,
        wv: Weight | None,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
        v_normed: bool = False,
        normed_last: bool = False,
    ) -> tuple[HeadRows, HeadRows, HeadRows]:
        """h through three matrices and their biases: q [T, nq, D], k and v [T, nkv, D], of which wq and wk say D and
        nkv.

        q and k are normalised (as `norm`) where a weight is given: [D], head by head; [nq, D], with a row for each
        head; or [nq * D], over all heads. Then they are rotated unless rope is None (arXiv 2104.09864). normed_last:
        they are normalised after that, head by head; without a weight where none is given. v_normed: v is normalised
        head by head, too, without a weight. wv None, where v is normalised: v is made of what wk gives. wk None, too: k
        and v are those of the layer that this one's state names (core.SharedKeysValues).
        """

    @abstractmethod
    def attention(
        self,
        q: HeadRows,
        k: HeadRows,
        v: HeadRows,
        *,
        scale: float,
        window: int | None = None,
        chunked: bool = False,
        softcap: float | None = None,
        sinks: Weight | None = None,
        both_ways: bool = False,
    ) -> Input:
        """Causal grouped-query attention, softmax(scale * q·kᵀ)·v, over the cache's tokens and the batch's own: [T, nq
        * D].

        window: a query sees that many tokens, itself the last (None: all). chunked: it sees those of its own chunk of
        `window` instead, which begins at a multiple of that. softcap: scores s become
        softcap * tanh(s / softcap) (arXiv 2408.00118). sinks: a vector [nq], a score of each head that takes a share of
        the softmax and gives no value (arXiv 2309.17453). both_ways: a query also sees the tokens after it, with
        a window as many as before it; then sequences are whole, and there is no cache.
        """

    @abstractmethod
    def gated_qkv(
        self,
        h: Input,
        wq: Weight,
        wk: Weight,
        wv: Weight,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
    ) -> tuple[HeadRows, HeadRows, HeadRows, Any]:
        """As `qkv`, where wq's rows are for each head those of q, then those of a gate; with the gates, for `gated`."""

    @abstractmethod
    def gated(self, a: Input, gate: Any) -> Input:
        """a * sigmoid(gate), of attention's output a [T, nq * D]."""

    @abstractmethod
    def delta_net(self, h: Input, w: Weights, net: DeltaNet) -> Input:
        """Gated DeltaNet between the norm before it and its output matrix (arXiv 2412.06464): [T, value_heads *
        head_dim].

        The rows of attn_qkv h of each sequence go through a causal convolution by ssm_conv1d and silu, and are q, k and
        v. q and k are L2-normalised head by head. With beta = sigmoid(ssm_beta h), g = ssm_a * softplus(ssm_alpha h +
        ssm_dt), and a state S that is zero at a sequence's start, each token makes S = e^g S, u = beta (v - S^T k), S =
        S + k u^T and o = S^T q / sqrt(head_dim). Returns rms_norm(o, ssm_norm) head by head, times silu(attn_gate h).
        """

    @abstractmethod
    def kda(self, h: Input, w: Weights, net: KimiDelta) -> Input:
        """Kimi Delta Attention between the norm before it and its output matrix (arXiv 2510.26692): [T, heads *
        head_dim].

        As `delta_net`, but that q, k and v have a matrix and a convolution each (attn_q and ssm_conv1d_q, …), and that
        a token's decay is g = ssm_a * softplus(ssm_f_b ssm_f_a h + ssm_dt) for each of a key's elements: S = diag(e^g)
        S. Returns rms_norm(o, ssm_norm) head by head, times sigmoid(ssm_g_b ssm_g_a h).
        """

    @abstractmethod
    def mamba2(self, h: Input, w: Weights, net: Mamba2) -> Input:
        """Mamba-2 between the norm before it and its output matrix (arXiv 2405.21060): [T, heads * head_dim].

        ssm_in h is z, then what goes through a causal convolution by ssm_conv1d (with a bias) and silu and is x, B and
        C, then a step dt of each head. With d = softplus(dt + ssm_dt) and a state S [state, head_dim] that is zero at a
        sequence's start, each token makes S = e^(d ssm_a) S + B (d x)^T and y = S^T C + ssm_d x. Returns y * silu(z),
        RMS-normalised group by group by ssm_norm where the file has that.
        """

    @abstractmethod
    def short_convolution(self, h: Input, w: Weights) -> Input:
        """A gated convolution between the norm before it and its output matrix (LFM2, arXiv 2511.23404): [T, H].

        shortconv.in_proj h is b, c and u; b * u goes through a causal convolution by shortconv.conv, channel by
        channel. Returns c times that.
        """

    @abstractmethod
    def linear(self, a: Input, weight: Weight, residual: Residual | None = None, scale: float = 1.0) -> Any:
        """scale * (a · Wᵀ + bias) (+ residual): Sums, or the new Residual where one is given.

        A scale other than 1 is for matrices without a bias.
        """

    @abstractmethod
    def projected(self, a: Input, weight: Weight) -> Input:
        """weight · a + its bias, as what another matrix is multiplied by: [T, rows]."""

    @abstractmethod
    def mlp(
        self,
        h: Input,
        gate: Weight | None,
        up: Weight,
        down: Weight,
        *,
        activation: str,
        residual: Residual | None = None,
        scale: float = 1.0,
        sparsity: float | None = None,
    ) -> Any:
        """scale * down(act(gate(h)) * up(h)) (+ residual) (arXiv 2002.05202), or of act(up(h)) without a gate; what it
        returns, and scale, as in `linear`.

        activation: "silu" or "gelu_tanh" (ggml_silu, ggml_gelu); without a gate "gelu_tanh" or "relu_squared", which
        is max(x, 0)² (arXiv 2109.08668). sparsity: of each token's gates only what is above their mean by so many
        standard deviations counts: g becomes max(g - mean - sparsity * deviation, 0) before the activation.
        """

    @abstractmethod
    def moe(
        self,
        h: Input,
        w: Weights,
        experts: Experts,
        *,
        activation: str,
        residual: Residual | None = None,
        scores: Sums | None = None,
        shared: tuple[Sums, Weight] | None = None,
    ) -> Any:
        """The sum of the used experts' feed-forward networks (each as `mlp`), weighted by their shares (+ residual);
        what it returns as in `linear`.

        w: Weights with ffn_gate_inp, the router, and ffn_gate_exps (unless experts have no gates), ffn_up_exps and
        ffn_down_exps; where there is ffn_down_exps.scale, each expert's share is multiplied by its value. experts: how
        tokens are routed to them. activation: also "swiglu_oai" (ggml_swiglu_oai with 1.702 and 7). scores:
        `router_scores`' where they are not the router's of h. shared: what a network that every token goes through
        makes of h, y, and a vector [H]: sigmoid(h · vector) * y is added, too.
        """

    @abstractmethod
    def router_scores(self, x: Residual, norm: Weight, router: Weight, scale: float) -> Sums:
        """scale * (rms_norm(x, norm) · routerᵀ): [T, experts]."""

    @abstractmethod
    def embed_for_layers(self, x: Residual, table: Weight, matrix: Weight, norm: Weight) -> None:
        """Make each token's embeddings for the layers, P = norm's length values for each: (sqrt(P) * table[token] +
        rms_norm(x · matrixᵀ / sqrt(H), norm)) / sqrt(2), the norm over P values at a time."""

    @abstractmethod
    def add_gated_embedding(
        self, x: Residual, gate: Weight, matrix: Weight, norm: Weight, factor: Weight | None
    ) -> Residual:
        """As `add_rms_norm`, of matrix (gelu(gate x) * e), where e is the token's embedding for this layer
        (`embed_for_layers`)."""

    @abstractmethod
    def latent_attention(
        self, h: Input, w: Weights, latent: LatentAttention, *, rope: Rope | None, scale: float
    ) -> Input:
        """Multi-head latent attention between the norm before it and its output matrix (arXiv 2405.04434): [T, heads *
        value_dim].

        q = attn_q h, or attn_q_b rms_norm(attn_q_a h, attn_q_a_norm): of each head q_n [key_dim], then q_r [rotary].
        attn_kv_a_mqa h is c [rank], then k_r [rotary]; c = rms_norm(c, attn_kv_a_norm). q_r and k_r are rotated unless
        rope is None. c and k_r are what the layer keeps of a token (core.Latent). Of each head k_n [key_dim] and v
        [value_dim] are what attn_k_b (transposed) and attn_v_b, or attn_kv_b, make of c. Causal attention,
        softmax(scale * (q_n·k_n + q_r·k_r))·v, over the cache's tokens and the batch's own.
        """

    @abstractmethod
    def altup_streams(self, x: Residual, matrices: Weight) -> Residual:
        """Residual streams (AltUp, arXiv 2301.13310): x, and what each of a stack of matrices makes of x, each of a
        token's rows as long as x's (Euclidean)."""

    @abstractmethod
    def altup_predict(self, x: Residual, w: Weights) -> tuple[Residual, Residual]:
        """Streams x + c x, where c [T, streams, streams] is altup_predict_coef tanh(altup_router rms_norm(x_0,
        altup_router_norm) / H); and the first of them by itself, which is the caller's."""

    @abstractmethod
    def altup_correct(self, x: Residual, made: Residual, w: Weights) -> Residual:
        """Streams x + c (made - x_0), where c is 1 + altup_correct_coef tanh(altup_router rms_norm(made,
        altup_router_norm) / H); to all but the first then rms_norm(proj (gelu(inp_gate (altup_correct_scale x_0)) * e),
        post_norm) is added, where e is the token's embedding for this layer (`embed_for_layers`)."""

    @abstractmethod
    def altup_merge(self, x: Residual, matrices: Weight) -> Residual:
        """The mean of the first stream, and of what each of a stack of matrices makes of the others, each of a token's
        rows as long as the first stream's."""

    @abstractmethod
    def pool(self, x: Residual, norm: Weight) -> PendingHead:
        """A vector of each segment: the mean of rms_norm(x, norm) over the rows that the batch's pooling says.

        Returns a function that waits for Vectors.
        """

    @abstractmethod
    def head(
        self,
        x: Residual,
        norm: Weight,
        output: Weight,
        logits: Logits,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> PendingHead:
        """rms_norm, the output matrix, and what is told of the logits; the greedy token is the lowest id of equals.

        Logits are multiplied by scale, and then y becomes softcap * tanh(y / softcap). Returns a function that waits
        for Ranks where logits are "ranks" and for a HeadResult otherwise, whose own logit and log-probability are NaN
        where a logit that decides the greedy token is. Where a collector listens, it hears the output matrix's input at
        all positions, and the function gives a HeadResult of nothing.
        """
