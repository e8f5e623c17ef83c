"""Gated DeltaNet in NumPy float32 (arXiv 2412.06464): the recurrence as it is written, token by token."""

from __future__ import annotations

import math

import numpy as np

from ...core import Float32Array
from ...models.delta_net import DeltaNet
from .functions import sigmoid, silu

# A sequence's state: the matrices [value_heads, d, d], and the convolution's last rows [kernel - 1, channels].
State = tuple[Float32Array, Float32Array]


def first_state(net: DeltaNet) -> State:
    """Of a sequence that has not begun."""
    state = net.state
    matrices = np.zeros((state.heads, state.key_dim, state.value_dim), np.float32)
    return matrices, np.zeros((state.taps, state.channels), np.float32)


def convolve(rows: Float32Array, before: Float32Array, taps: Float32Array) -> tuple[Float32Array, Float32Array]:
    """silu of a causal convolution of rows [T, channels] channel by channel; taps [channels, K], the last for the row
    itself.

    before: the K - 1 rows before these. Returns the outcome and the rows that the next piece wants.
    """
    kernel = taps.shape[1]
    extended = np.concatenate([before, rows])
    out = np.zeros_like(rows)
    for tap in range(kernel):
        out += taps[:, tap] * extended[tap : tap + len(rows)]
    return silu(out), extended[len(extended) - (kernel - 1) :]


def recur(
    u: Float32Array,
    beta: Float32Array,
    decay: Float32Array,
    net: DeltaNet,
    epsilon: float,
    matrices: Float32Array,
) -> tuple[Float32Array, Float32Array]:
    """One sequence's tokens through the recurrence.

    u: q, k and v side by side [T, channels]; beta, decay (e^g): [T, value_heads]; matrices: the state before. Returns
    [T, value_heads, d] and the state after.
    """
    d, keys = net.head_dim, net.key_width
    q, k = (_normalised(part.reshape(len(u), -1, d), epsilon) for part in (u[:, :keys], u[:, keys : 2 * keys]))
    v = u[:, 2 * keys :].reshape(len(u), -1, d)
    q, k = q[:, net.key_head_of] * np.float32(1 / math.sqrt(d)), k[:, net.key_head_of]
    out, matrices = np.empty_like(v), matrices.copy()
    for t in range(len(u)):
        matrices *= decay[t][:, None, None]
        seen = np.matmul(k[t][:, None], matrices)[:, 0]
        change = beta[t][:, None] * (v[t] - seen)
        matrices += k[t][:, :, None] * change[:, None]
        out[t] = np.matmul(q[t][:, None], matrices)[:, 0]
    return out, matrices


def gates(
    beta: Float32Array, alpha: Float32Array, rate: Float32Array, bias: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """(beta, e^g) of their sums [T, value_heads]; rate: ssm_a, bias: ssm_dt."""
    step = np.logaddexp(np.float32(0), alpha + bias)  # softplus
    return sigmoid(beta), np.exp(rate * step)


def _normalised(x: Float32Array, epsilon: float) -> Float32Array:
    """x / sqrt(|x|² + epsilon) over the last axis."""
    normed: Float32Array = x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + np.float32(epsilon))
    return normed
