"""The ops in NumPy float32: the oracle that the CUDA kernels are held against."""

import math

import numpy as np

from ...errors import BackendError
from ...gguf import dequantize
from ..base import HeadResult, Ops, Ranks

_MATRIX_PIECE, _MATRIX_ROWS = 1 << 25, 1 << 13  # elements (128 MB), and rows, of a matrix that are dequantised at once
_SCORES_PIECE = 1 << 25  # attention scores held at once: 128 MB


class CpuOps(Ops):
    def __init__(self, config, batch, cache):
        self.config, self.batch, self.cache = config, batch, cache
        self._rotations = {}
        # What BLAS makes of a row depends on how many rows there are: each segment is multiplied by itself, so that it has the
        # same bits in any batch.
        self._segment_of = np.repeat(np.arange(len(batch.segments)), [s.length for s in batch.segments])

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
        q, k = (
            x if n is None else self.rms_norm(x.reshape(len(h), -1, *n.shape), n) for x, n in ((q, q_norm), (k, k_norm))
        )
        q, k, v = (x.reshape(len(h), -1, self.config.head_dim) for x in (q, k, v))
        if rope is None:
            return q, k, v
        if rope.beta:
            q = q * rope.temperature(self.batch.positions).astype(np.float32)[:, None, None]
        return self._rotate(q, rope), self._rotate(k, rope), v

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
        out = []
        for segment in self.batch.segments:
            keys, values, end = k[segment.rows], v[segment.rows], segment.position + segment.length
            if self.cache is not None:
                kept = self.cache.k[self.layer][:end], self.cache.v[self.layer][:end]
                kept[0][segment.position :], kept[1][segment.position :] = keys, values
                keys, values = kept
            elif segment.after is not None:
                before = self.batch.segments[segment.after].rows
                keys, values = np.concatenate([k[before], keys]), np.concatenate([v[before], values])
            out.append(self._attend(q[segment.rows], keys, values, segment.position, scale, window, softcap, sinks))
        return np.concatenate(out)

    def _attend(self, q, k, v, start, scale, window, softcap, sinks):
        """One segment's queries, from position `start` on, over its sequence's keys and values."""
        n = len(q)
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

    def linear(self, a, weight, residual=None, scale=1.0, batch_rows=None):
        self.enter("linear", [weight], len(a))
        out = np.empty((len(a), weight.shape[0]), np.float32)
        for at, part in self._products(a, weight, scale, np.arange(len(a)) if batch_rows is None else batch_rows):
            out[:, at : at + part.shape[1]] = part
        if residual is not None:
            out += residual
        return out

    def _products(self, a, weight, scale, batch_rows):
        """(first row of the matrix, scale * (a · Wᵀ + bias) of its rows from there on), piece by piece. batch_rows: whose
        rows of the batch a has, ascending."""
        tensor, (rows, columns) = weight.tensor, weight.shape
        bias = None if weight.bias is None else _vector(weight.bias)
        ends = [*np.flatnonzero(np.diff(self._segment_of[batch_rows])) + 1, len(a)]
        step = max(1, min(_MATRIX_PIECE // columns, _MATRIX_ROWS))
        for at in range(0, rows, step):
            part, begin = dequantize(tensor.data[at : at + step], tensor.type).T, 0
            out = np.empty((len(a), part.shape[1]), np.float32)
            for end in ends:
                np.matmul(a[begin:end], part, out=out[begin:end])
                begin = end
            if bias is not None:
                out += bias[at : at + step]
            yield at, out if scale == 1.0 else out * np.float32(scale)

    def mlp(self, h, gate, up, down, *, activation, residual=None, scale=1.0, batch_rows=None):
        gate, up = (self.linear(h, weight, batch_rows=batch_rows) for weight in (gate, up))
        return self.linear(_ACTIVATIONS[activation](gate, up), down, residual, scale, batch_rows)

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
            out[tokens] += shares[tokens, slot, None] * self.mlp(
                h[tokens], gate, up, down, activation=activation, batch_rows=tokens
            )
        return out

    def add_gated(self, x, y, h, weight):
        return x + y / (1 + np.exp(-(h * _vector(weight.tensor)).sum(axis=-1)))[:, None]

    def head(self, x, norm, output, logits, scale=1.0, softcap=None):
        rows = (
            np.arange(len(x))
            if logits == "all"
            else self.batch.targets.rows
            if logits == "ranks"
            else np.array([len(x) - 1])
        )
        self.enter("head", [output], len(rows))
        parts = (
            (at, part if softcap is None else np.float32(softcap) * np.tanh(part / np.float32(softcap)))
            for at, part in self._products(self.rms_norm(x[rows], norm), output, scale, rows)
        )
        if logits == "ranks":
            ranks = _ranks(parts, self.batch.targets)
            return lambda: ranks
        scores = np.concatenate([part for _, part in parts], axis=1)
        last = scores[-1]
        if np.isnan(last).any():
            raise BackendError("the last position's logits hold NaN: the file's weights are damaged or out of range")
        token = int(np.argmax(last))  # the lowest of equals
        shifted = last.astype(np.float64) - float(last[token])
        result = None if logits is None else scores if logits == "all" else last
        return HeadResult(token, float(last[token]), -math.log(np.exp(shifted).sum()), result)


def _ranks(parts, targets):
    """Ranks from logits that come some columns at a time: (first column, float32 [S, columns])."""
    n, every = len(targets.rows), np.arange(len(targets.rows))
    largest, total = (
        np.full(n, -np.inf, np.float32),
        np.zeros(n),
    )  # of all so far; the sum of exponentials, relative to it
    wanted, best, best_ids = np.zeros(n), np.empty((n, 0), np.float32), np.empty((n, 0), np.int32)
    for first, part in parts:
        here = (targets.tokens >= first) & (targets.tokens < first + part.shape[1])
        wanted[here] = part[every[here], targets.tokens[here] - first]
        now = np.maximum(largest, part.max(axis=1))  # NaN stays NaN
        with np.errstate(invalid="ignore"):
            total = total * np.exp(largest - now) + np.exp(part - now[:, None]).sum(axis=1, dtype=np.float64)
        largest = now
        for _ in range(min(targets.top, part.shape[1])):
            token = part.argmax(axis=1)  # the first of equals
            best, best_ids = np.c_[best, part[every, token]], np.c_[best_ids, (first + token).astype(np.int32)]
            part[every, token] = -np.inf
        order = np.argsort(-best, axis=1, kind="stable")[:, : targets.top]  # of equals those of earlier columns first
        best, best_ids = np.take_along_axis(best, order, axis=1), np.take_along_axis(best_ids, order, axis=1)
    base = largest + np.log(total)
    return Ranks((wanted - base).astype(np.float32), best_ids, (best - base[:, None]).astype(np.float32))


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
