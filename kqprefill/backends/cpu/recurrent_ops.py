"""Recurrences and convolutions over a sequence in NumPy float32, as they are written: token by token."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, TypeAlias

import numpy as np

from ...core import Float32Array, Recurrent
from ...models.delta_net import DeltaNet
from ...models.kda import KimiDelta
from ...models.mamba2 import Mamba2
from ...models.weights import Weights
from .collector import HearingOps
from .functions import normalised, sigmoid, silu, vector_of

# A sequence's state: the matrices [heads, key_dim, value_dim], and the convolution's last rows [taps, channels].
State: TypeAlias = tuple[Float32Array, Float32Array]


def first_state(state: Recurrent) -> State:
    """Of a sequence that has not begun."""
    matrices = np.zeros((state.heads, state.key_dim, state.value_dim), np.float32)
    return matrices, np.zeros((state.taps, state.channels), np.float32)


Recurrence: TypeAlias = DeltaNet | KimiDelta | Mamba2


class RecurrentOps(HearingOps):
    """Part of CpuOps."""

    cache: Any  # CpuCache | None

    def delta_net(self, h: Float32Array, w: Weights, net: DeltaNet) -> Float32Array:
        rows, z = self.linear(h, w.attn_qkv), self.linear(h, w.attn_gate)
        rates = np.concatenate([self.linear(h, w.ssm_beta), self.linear(h, w.ssm_alpha)], axis=1)
        out = self._through(net, w, rows, rates)
        normed: Float32Array = self.norm(out, w.ssm_norm)
        return normed.reshape(len(h), -1) * silu(z)

    def kda(self, h: Float32Array, w: Weights, net: KimiDelta) -> Float32Array:
        rows = np.concatenate([self.linear(h, weight) for weight in (w.attn_q, w.attn_k, w.attn_v)], axis=1)
        step = softplus(self.linear(self.linear(h, w.ssm_f_a), w.ssm_f_b) + vector_of(w.ssm_dt_bias.tensor))
        decay = np.exp(np.repeat(vector_of(w.ssm_a.tensor).reshape(-1), net.head_dim) * step)
        beta, z = sigmoid(self.linear(h, w.ssm_beta)), self.linear(self.linear(h, w.ssm_g_a), w.ssm_g_b)
        out = self._through(net, w, rows, np.concatenate([decay, beta], axis=1))
        normed: Float32Array = self.norm(out, w.ssm_norm)
        return normed.reshape(len(h), -1) * sigmoid(z)

    def mamba2(self, h: Float32Array, w: Weights, net: Mamba2) -> Float32Array:
        z, rows, dt = (self.linear(h, weight) for weight in (w.ssm_in_z, w.ssm_in_xbc, w.ssm_in_dt))
        out = self._through(net, w, rows, dt)
        gated: Float32Array = out.reshape(len(h), -1) * silu(z)
        weight = w.get("ssm_norm_weight")
        if weight is None:
            return gated
        normed = normalised(gated.reshape(len(h), net.groups, -1), self.config.norm_epsilon)
        result: Float32Array = (normed * vector_of(weight.tensor)).reshape(len(h), -1)
        return result

    def _through(self, net: Recurrence, w: Weights, rows: Float32Array, rates: Float32Array) -> Float32Array:
        """What a recurrence gives of all tokens, [T, heads, value_dim]; rows, rates: as for `advance`."""
        self.enter("rest")
        out = np.empty((len(rows), net.state.heads, net.state.value_dim), np.float32)

        def advance_segment(own: slice, matrices: Float32Array, before: Float32Array) -> State:
            out[own], state = advance(net, w, rows[own], rates[own], (matrices, before), self.config.norm_epsilon)
            return state

        self._advance(net.state, advance_segment)
        return out

    def short_convolution(self, h: Float32Array, w: Weights) -> Float32Array:
        b, c, u = np.split(self.linear(h, w.shortconv_in_proj), 3, axis=1)
        self.enter("rest")
        rows, taps = b * u, vector_of(w.shortconv_conv.tensor)
        out: Float32Array = np.empty_like(c)

        def advance(own: slice, matrices: Float32Array, before: Float32Array) -> State:
            out[own], before = convolve(rows[own], before, taps)
            return matrices, before

        self._advance(Recurrent(0, 0, 0, taps.shape[0], taps.shape[1] - 1), advance)
        out *= c
        return out

    def _advance(self, state: Recurrent, advance: Callable[[slice, Float32Array, Float32Array], State]) -> None:
        """Take each segment through a recurrence: advance(its rows of the batch, the state before), which gives the
        state after."""
        ends: list[State] = []  # each segment's
        for segment in self.batch.segments:
            if segment.after is not None:
                before = ends[segment.after]
            elif self.cache is not None and segment.position:
                before = self.cache.recurrences[self.layer]
            else:
                before = first_state(state)
            ends.append(advance(segment.rows, *before))
            if self.cache is not None:
                for kept, new in zip(self.cache.recurrences[self.layer], ends[-1]):
                    kept[...] = new


def advance(
    net: Recurrence, w: Weights, rows: Float32Array, rates: Float32Array, before: State, epsilon: float
) -> tuple[Float32Array, State]:
    """Tokens that follow one another through a recurrence, and the state after them; before: the state before.

    rows: what goes into the convolution, [T, channels]. rates: what the steps are made of, [T, rates]: of Gated
    DeltaNet what ssm_beta and ssm_alpha give; of Mamba-2 what ssm_in's last rows give; of Kimi Delta Attention the
    decays themselves, then beta. Returns [T, heads, value_dim].
    """
    if isinstance(net, DeltaNet):
        return _advance_delta(net, w, rows, rates, before, epsilon)
    if isinstance(net, KimiDelta):
        return _advance_kda(net, w, rows, rates, before, epsilon)
    return _advance_mamba(net, w, rows, rates, before)


def _advance_delta(
    net: DeltaNet, w: Weights, rows: Float32Array, rates: Float32Array, before: State, epsilon: float
) -> tuple[Float32Array, State]:
    u, tail = convolve(rows, before[1], vector_of(w.ssm_conv1d.tensor))
    rate, bias, heads = vector_of(w.ssm_a.tensor), vector_of(w.ssm_dt_bias.tensor), net.value_heads
    beta, decay = gates(rates[:, :heads], rates[:, heads:], rate, bias)
    out, matrices = recur(silu(u), beta, decay, net, epsilon, before[0])
    return out, (matrices, tail)


def _advance_kda(
    net: KimiDelta, w: Weights, rows: Float32Array, rates: Float32Array, before: State, epsilon: float
) -> tuple[Float32Array, State]:
    heads, d = net.heads, net.head_dim
    convolutions = w.ssm_conv1d_q, w.ssm_conv1d_k, w.ssm_conv1d_v
    taps = np.concatenate([vector_of(weight.tensor).reshape(-1, net.kernel) for weight in convolutions])
    u, tail = convolve(rows, before[1], taps)
    q, k, v = silu(u).reshape(-1, 3, heads, d).transpose(1, 0, 2, 3)
    q, k = (unit(x, epsilon) for x in (q, k))
    decay, beta = rates[:, : net.width].reshape(-1, heads, d), rates[:, net.width :]
    out, matrices = delta_rule(q * np.float32(1 / math.sqrt(d)), k, v, beta, decay, before[0])
    return out, (matrices, tail)


def _advance_mamba(
    net: Mamba2, w: Weights, rows: Float32Array, rates: Float32Array, before: State
) -> tuple[Float32Array, State]:
    step = softplus(rates + vector_of(w.ssm_dt_bias.tensor))
    decay = np.exp(vector_of(w.ssm_a.tensor).reshape(-1) * step)
    u, tail = convolve(rows, before[1], vector_of(w.ssm_conv1d.tensor))
    if w.ssm_conv1d.bias is not None:
        u += vector_of(w.ssm_conv1d.bias)
    x, b, c = np.split(silu(u), np.cumsum([net.width, net.groups * net.state_size]), axis=1)
    x = x.reshape(-1, net.heads, net.head_dim)
    b, c = (of_heads(part, net) for part in (b, c))
    out = x * vector_of(w.ssm_d.tensor).reshape(-1, 1)
    matrices, scaled = before[0].copy(), x * step[:, :, None]
    for t, y in enumerate(out):
        matrices *= decay[t][:, None, None]
        matrices += b[t][:, :, None] * scaled[t][:, None]
        y += np.matmul(c[t][:, None], matrices)[:, 0]
    return out, (matrices, tail)


def convolve(rows: Float32Array, before: Float32Array, taps: Float32Array) -> tuple[Float32Array, Float32Array]:
    """A causal convolution of rows [T, channels] channel by channel; taps [channels, K], the last for the row itself.

    before: the K - 1 rows before these. Returns the outcome and the rows that the next piece wants.
    """
    kernel = taps.shape[1]
    extended = np.concatenate([before, rows])
    out = np.zeros_like(rows)
    for tap in range(kernel):
        out += taps[:, tap] * extended[tap : tap + len(rows)]
    return out, extended[len(extended) - (kernel - 1) :]


def recur(
    u: Float32Array,
    beta: Float32Array,
    decay: Float32Array,
    net: DeltaNet,
    epsilon: float,
    matrices: Float32Array,
) -> tuple[Float32Array, Float32Array]:
    """One sequence's tokens through Gated DeltaNet's recurrence (arXiv 2412.06464).

    u: q, k and v side by side [T, channels]; beta, decay (e^g): [T, value_heads]; matrices: the state before. Returns
    [T, value_heads, d] and the state after.
    """
    d, keys = net.head_dim, net.key_width
    q, k = (unit(part.reshape(len(u), -1, d), epsilon) for part in (u[:, :keys], u[:, keys : 2 * keys]))
    v = u[:, 2 * keys :].reshape(len(u), -1, d)
    q, k = q[:, net.key_head_of] * np.float32(1 / math.sqrt(d)), k[:, net.key_head_of]
    return delta_rule(q, k, v, beta, decay[:, :, None], matrices)


def delta_rule(
    q: Float32Array, k: Float32Array, v: Float32Array, beta: Float32Array, decay: Float32Array, matrices: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """S = diag(decay) S, S = S + k (beta (v - S^T k))^T, o = S^T q, token by token.

    q, k, v: [T, heads, d]; beta [T, heads]; decay [T, heads, d or 1]; matrices S [heads, d, d]. Returns o [T, heads, d]
    and the matrices after.
    """
    out, matrices = np.empty_like(v), matrices.copy()
    for t in range(len(v)):
        matrices *= decay[t][:, :, None]
        seen = np.matmul(k[t][:, None], matrices)[:, 0]
        change = beta[t][:, None] * (v[t] - seen)
        matrices += k[t][:, :, None] * change[:, None]
        out[t] = np.matmul(q[t][:, None], matrices)[:, 0]
    return out, matrices


def gates(
    beta: Float32Array, alpha: Float32Array, rate: Float32Array, bias: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """(beta, e^g) of their sums [T, value_heads]; rate: ssm_a, bias: ssm_dt."""
    return sigmoid(beta), np.exp(rate * softplus(alpha + bias))


def softplus(x: Float32Array) -> Float32Array:
    """ln(1 + exp(x))."""
    result: Float32Array = np.logaddexp(np.float32(0), x)
    return result


def of_heads(part: Float32Array, net: Mamba2) -> Float32Array:
    """B or C [T, groups * state] as each head has it, [T, heads, state]."""
    return np.repeat(part.reshape(len(part), net.groups, -1), net.heads // net.groups, axis=1)


def unit(x: Float32Array, epsilon: float) -> Float32Array:
    """x / sqrt(|x|² + epsilon) over the last axis."""
    normed: Float32Array = x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + np.float32(epsilon))
    return normed
