"""The ops in NumPy float32: the oracle that the CUDA kernels are held against."""

import math

import numpy as np

from ...errors import BackendError
from ...gguf import dequantize
from ..base import HeadResult, Ops

_MATRIX_PIECE = 1 << 25  # elements of a matrix that are dequantised at once: 128 MB
_SCORES_PIECE = 1 << 25  # attention scores held at once: 128 MB


class CpuOps(Ops):
    def __init__(self, config, batch, cache):
        self.config, self.batch, self.cache = config, batch, cache
        self._rotations = {}

    def embed(self, weight, tokens, scale=1.0):
        self.enter("rest")
        return dequantize(weight.tensor.data[tokens], weight.tensor.type) * np.float32(scale)

    def rms_norm(self, x, weight):
        self.enter("rest")
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(self.config.rms_epsilon)) * _vector(weight.tensor)

    def cast(self, x):
        return x

    def add_rms_norm(self, x, y, weight):
        return x + self.rms_norm(y, weight)

    def qkv(self, h, wq, wk, wv, *, rope, q_norm=None, k_norm=None):
        q, k, v = (self.linear(h, w) for w in (wq, wk, wv))
        q, k = (x if n is None else self.rms_norm(x.reshape(len(h), -1, *n.shape), n) for x, n in ((q, q_norm), (k, k_norm)))
        q, k, v = (x.reshape(len(h), -1, self.config.head_dim) for x in (q, k, v))
        return (q, k, v) if rope is None else (self._rotate(q, rope), self._rotate(k, rope), v)

    def _rotate(self, x, rope):
        self.enter("rest")
        if id(rope) not in self._rotations:
            angle = self.batch.positions[:, None] * rope.inv_freq  # float64: positions can be large
            cos_sin = np.cos(angle) * rope.magnitude, np.sin(angle) * rope.magnitude
            self._rotations[id(rope)] = tuple(a.astype(np.float32)[:, None, :] for a in cos_sin)
        cos, sin = self._rotations[id(rope)]
        width = rope.width
        pairs = (
            (slice(0, width, 2), slice(1, width, 2))
            if rope.interleaved
            else (slice(0, width // 2), slice(width // 2, width))
        )
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        out = x.copy()
        out[..., pairs[0]] = a * cos - b * sin
        out[..., pairs[1]] = a * sin + b * cos
        return out

    def attention(self, q, k, v, *, scale, window=None, softcap=None, sinks=None):
        self.enter_attention(window)
        start, n = self.batch.start, len(q)
        if self.cache is not None:
            keys, values = self.cache.k[self.layer], self.cache.v[self.layer]
            keys[start : start + n], values[start : start + n] = k, v
            k, v = keys[: start + n], values[: start + n]
        nkv, head_dim = k.shape[1:]
        group = q.shape[1] // nkv
        q = q.reshape(n, nkv, group, head_dim).transpose(1, 2, 0, 3)  # [nkv, group, T, D]
        k, v = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]  # [nkv, 1, D, S], [nkv, 1, S, D]
        out = np.empty((n, nkv, group, head_dim), np.float32)
        sinks = None if sinks is None else _vector(sinks.tensor).reshape(nkv, group, 1, 1)
        step = max(1, _SCORES_PIECE // (nkv * group * (start + n)))
        for at in range(0, n, step):
            rows = slice(at, min(at + step, n))
            first = 0 if window is None else max(0, start + at - window + 1)
            seen = slice(first, start + rows.stop)
            scores = q[:, :, rows] @ k[..., seen] * np.float32(scale)
            if softcap is not None:
                scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
            behind = np.arange(start + rows.start, start + rows.stop)[:, None] - np.arange(seen.start, seen.stop)
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            scores[..., hidden] = -np.inf
            out[rows] = (_softmax(scores, sinks) @ v[:, :, seen]).transpose(2, 0, 1, 3)
        return out.reshape(n, -1)

    def linear(self, a, weight, residual=None, scale=1.0):
        self.enter("linear", [weight], len(a))
        tensor, (rows, columns) = weight.tensor, weight.shape
        out = np.empty((len(a), rows), np.float32)
        step = max(1, _MATRIX_PIECE // columns)
        for at in range(0, rows, step):
            np.matmul(a, dequantize(tensor.data[at : at + step], tensor.type).T, out=out[:, at : at + step])
        if weight.bias is not None:
            out += _vector(weight.bias)
        if scale != 1.0:
            out *= np.float32(scale)
        if residual is not None:
            out += residual
        return out

    def mlp(self, h, gate, up, down, *, activation, residual=None, scale=1.0):
        gated = _ACTIVATIONS[activation](self.linear(h, gate), self.linear(h, up))
        return self.linear(gated, down, residual=residual, scale=scale)

    def moe(self, h, w, experts, *, activation, residual):
        scores = self.linear(h, w.ffn_gate_inp)
        if not experts.routed_after:
            scores = _softmax(scores)
        used = np.argsort(-scores, axis=-1, kind="stable")[:, : experts.used]
        shares = np.take_along_axis(scores, used, axis=-1)
        if experts.routed_after:
            shares = _softmax(shares)
        if experts.normalise:
            shares /= shares.sum(axis=-1, keepdims=True)
        out = residual.copy()
        for expert in np.unique(used):
            tokens, slot = np.nonzero(used == expert)
            gate, up, down = (weight.expert(expert) for weight in (w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps))
            out[tokens] += shares[tokens, slot, None] * self.mlp(h[tokens], gate, up, down, activation=activation)
        return out

    def add_gated(self, x, y, h, weight):
        return x + y / (1 + np.exp(-(h @ _vector(weight.tensor))))[:, None]

    def head(self, x, norm, output, logits, scale=1.0, softcap=None):
        self.enter("head", [output], len(x) if logits == "all" else 1)
        scores = self.linear(self.rms_norm(x if logits == "all" else x[-1:], norm), output, scale=scale)
        if softcap is not None:
            scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
        last = scores[-1]
        if np.isnan(last).any():
            raise BackendError("the last position's logits hold NaN: the file's weights are damaged or out of range")
        token = int(np.argmax(last))  # the lowest of equals
        shifted = last.astype(np.float64) - float(last[token])
        result = None if logits is None else scores if logits == "all" else last
        return HeadResult(token, float(last[token]), -math.log(np.exp(shifted).sum()), result)


def _vector(tensor):
    return dequantize(tensor.data, tensor.type)


def _softmax(x, sink=None):
    """In place, over the last axis; sink: one more score, whose share is dropped."""
    largest = x.max(axis=-1, keepdims=True)
    largest = largest if sink is None else np.maximum(largest, sink)
    x -= largest
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True) + (0 if sink is None else np.exp(sink - largest))
    return x


def _silu(x):
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and x / inf the 0 it should be
        return x / (1 + np.exp(-x))


def _gelu_tanh(x):
    return (
        np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    )


def _swiglu_oai(gate, up):
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1)


_ACTIVATIONS = {
    "silu": lambda gate, up: _silu(gate) * up,
    "gelu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "swiglu_oai": _swiglu_oai,
}
