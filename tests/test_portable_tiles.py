"""The portable kernels' products, exact and in int8: the same bits whatever the tiles."""

from types import SimpleNamespace

import numpy as np
import pytest

from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32
from kqprefill.backends.cuda.gemm import int8, portable
from kqprefill.backends.cuda.gemm.operand import HALVES, Operand
from kqprefill.gguf.types import GGML
from test_int8 import close_to, device  # noqa: F401  # device: a fixture


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_every_tile_gives_the_same_bits(device, precision, rng, monkeypatch):  # noqa: F811
    """Of one matrix, of gate and up, and with an activation; however few tokens or rows of weights fill a tile."""
    make = device.exact if precision == "exact" else device.matrix
    (linear, rows), (gate, _), (up, _) = (
        make(name, (n, 160), GGML.Q8_0) for name, n in (("attn_q", 150), ("ffn_gate", 100), ("ffn_up", 100))
    )
    gemm = device.gemms.choose([linear])
    if not isinstance(gemm, portable.PortableGemm | int8.PortableInt8Gemm):
        pytest.skip("tiles of the portable GEMM")
    n = 66 if device.backend is None else 300
    a, x = device.operand(n, 160, rng)
    scale = device.small.constant(np.array([4.0], np.float32))
    found = []
    for config in (*portable.LARGE, *portable.MEDIUM, *portable.SMALL):
        if config.shared_bytes > device.gpu.shared_memory:
            continue
        for module in (portable, int8):
            monkeypatch.setattr(module, "best_config", lambda *_, config=config: config)
        out = device.poisoned("out", FLOAT32, n, 150)
        gemm.linear(a, [linear], out, scale, None, False)
        act, other = (device.poisoned(name, FLOAT16, n, HALVES.padded(100)) for name in ("act", "other"))
        gemm.gated(a, gate, up, Operand(act, 100, scale), scale, (None, None), "silu")
        gemm.activated(a, gate, Operand(other, 100, scale), scale, None, "gelu_tanh")
        found.append([device.get(array) for array in (out, act, other)])
    assert len(found) >= 3 and all(np.isfinite(own).all() for own in found[0])
    assert all(np.array_equal(own, first) for results in found for own, first in zip(results, found[0]))
    if precision == "exact":
        assert close_to(x @ rows.T.astype(np.float64), found[0][0].astype(np.float64), 1e-2)


def test_tiles_are_chosen_by_what_their_rounds_take():
    """Few outputs are given to as many multiprocessors as there are, many by the largest tiles."""
    for shared_memory, multiprocessors, some in ((227 << 10, 132, 512), (99 << 10, 84, 256)):
        facts = SimpleNamespace(shared_memory=shared_memory, multiprocessors=multiprocessors)
        sizes = [portable.fitting(size, shared_memory) for size in (portable.SMALL, portable.MEDIUM, portable.LARGE)]
        chosen = [sizes.index(portable.best_config(m, 4096, facts)) for m in (16, some, 8192)]
        assert chosen == [0, 1, 2]
