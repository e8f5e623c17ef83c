"""Attention's online softmax: weights are relative to a score that changes only where later ones would weigh more than
2^8 times as much (kernels/include/softmax.cuh). Scores that do and do not, against NumPy; on emulated kernels and a
GPU."""

from types import SimpleNamespace

import numpy as np
import pytest

from conftest import relative_error
from kqprefill.backends.cuda.device.arrays import FLOAT16
from kqprefill.backends.cuda.gemm.operand import operand_positions
from kqprefill.backends.cuda.ops.attention import AttentionOps
from kqprefill.backends.cuda.ops.attention_layout import attention_layout
from kqprefill.backends.cuda.ops.batch import Attending
from kqprefill.backends.cuda.ops.heads import Heads
from kqprefill.core import Segment
from test_int8 import device  # noqa: F401  # a fixture

N = 300
PLACE = np.arange(N) / N
# What a key's score is, in nats, of queries that have it as it is; every other query has it negated.
SCORES = {
    "rising": 120 * PLACE - 60,
    "creeping": 12 * PLACE,  # by less than 2^8 from one block of keys to the next
    "falling": 60 - 120 * PLACE,
    "a late one": np.where(np.arange(N) == 230, 30.0, 0.0),
    "just below": np.where(np.arange(N) >= 128, 5.5, 0.0),  # 2^8 is 5.55 nats
    "far beyond": np.where(np.arange(N) >= 128, 200.0, -200.0),
}


def attention(device, config, q, k, v, scale):  # noqa: F811
    """The op, of one sequence; q [n, nq, D], k and v [n, nkv, D] in halves."""
    n, nq, dim = q.shape
    one = device.small.constant(np.ones(1, np.float32))
    heads = [Heads(device.work.upload(name, x.astype(np.float16)), one, dim) for name, x in zip("qkv", (q, k, v))]
    tiles = device.work.upload("tiles", attention_layout([Segment(0, n, 0)], config).tiles)
    ops = SimpleNamespace(
        n=n,
        config=SimpleNamespace(head_count=nq),
        context=SimpleNamespace(gpu=device.gpu, maps=device.maps),
        launcher=device.launcher,
        work=device.work,
        leaves_one=False,
        attending=lambda *_: Attending(config, n, tiles),
        enter_attention=lambda *_: None,
        vector=lambda _: None,
        operand=lambda seen: seen,
    )
    out = device.poisoned("attended", FLOAT16, n, nq * dim)
    seen = AttentionOps.attention(ops, *heads, scale=scale)
    assert seen.values == out
    return device.get(out)[:, operand_positions(nq * dim)].astype(np.float32)


def reference(q, k, v, scale):
    """The same in float64."""
    (n, nq, _), nkv = q.shape, k.shape[1]
    out = np.empty(q.shape)
    for head in range(nq):
        own = head // (nq // nkv)
        scores = scale * q[:, head] @ k[:, own].T
        scores[np.triu_indices(n, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, own]
    return out.reshape(n, -1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("scores", SCORES)
def test_scores(device, scores, dim, rng):  # noqa: F811
    """Of rows of all kinds side by side, as a warp has them; and the same bits where fewer keys follow."""
    config = device.kernel_set.attention(dim, dim)
    scale, nq, nkv = 0.125, 2, 1
    q, k, v = (rng.standard_normal((N, heads, dim)).astype(np.float16) for heads in (nq, nkv, nkv))
    q, k = q * np.float16(0.2), k * np.float16(0.2)
    q[..., 0] = np.where(np.arange(N) % 2, -1, 1)[:, None]
    k[..., 0] = (SCORES[scores] / scale).astype(np.float16)[:, None]
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)), scale)
    got = attention(device, config, q, k, v, scale)
    assert np.isfinite(got).all() and relative_error(expected, got) < 2e-3
    assert np.abs(got - expected).max() < 2e-2
    assert np.array_equal(attention(device, config, q[:257], k[:257], v[:257], scale), got[:257])
