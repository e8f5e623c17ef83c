"""Hopper's products in int8: the same bits whatever the tiles, and however many a block makes."""

from types import SimpleNamespace

import numpy as np
import pytest

from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32
from kqprefill.backends.cuda.gemm import int8_hopper
from kqprefill.backends.cuda.gemm.operand import Operand
from test_int8 import close_to, device, products  # noqa: F401  # device: a fixture


def test_every_configuration_gives_the_same_bits(device, rng, monkeypatch):  # noqa: F811
    """Of Hopper's tiles, whatever shape they have and however few tokens or rows of weights fill them."""
    matrices = [device.matrix(f"attn_{name}", (n, 384))[0] for name, n in zip("qkv", (200, 40, 33))]
    gate, up = (device.matrix(f"ffn_{name}", (160, 384))[0] for name in ("gate", "up"))
    n = 70 if device.backend is None else 300
    a, _ = device.operand(n, 384, rng)
    scale = device.small.constant(np.array([4.0], np.float32))
    gemm = device.gemms.choose(matrices)
    if not isinstance(gemm, int8_hopper.HopperInt8Gemm):
        pytest.skip("configurations of Hopper's GEMM")
    found = []
    for config in int8_hopper.CONFIGS:
        if device.backend is None and config.tokens > 64:
            continue
        monkeypatch.setattr(int8_hopper, "best_config", lambda *_, config=config: config)
        out = device.poisoned("out", FLOAT32, n, 273)
        gemm.linear(a, matrices, out, None, None, False)
        found.append([device.get(out)])
        act = device.poisoned("act", FLOAT16, n, 192)
        gemm.activated(a, gate, Operand(act, 160, scale), None, None, "gelu_tanh")
        found[-1].append(device.get(act))
        if config.tiles == 2:
            for activation in ("silu", "gelu_tanh"):
                act = device.poisoned("act", FLOAT16, n, 192)
                gemm.gated(a, gate, up, Operand(act, 160, scale), None, (None, None), activation)
                found[-1].append(device.get(act))
    most = max(found, key=len)
    assert all(np.array_equal(*pair) for results in found for pair in zip(results, most))
    assert len(most) == 4 and all(np.isfinite(bits).all() for bits in most)


def test_many_tiles_of_one_step_for_each_block(device, rng, monkeypatch):  # noqa: F811
    """Blocks that make more output tiles than their ring has stages, each of one stage."""
    rows, n = 640, 70 if device.backend is None else 300
    matrix, _ = device.matrix("attn_k", (rows, 128))
    gate, up = (device.matrix(f"ffn_{name}", (rows, 128))[0] for name in ("gate", "up"))
    a, _ = device.operand(n, 128, rng)
    scale, gemm = device.small.constant(np.array([4.0], np.float32)), device.gemms.choose([matrix])
    if not isinstance(gemm, int8_hopper.HopperInt8Gemm):
        pytest.skip("blocks of Hopper's GEMM")

    def results():
        out = device.poisoned("out", FLOAT32, n, rows)
        gemm.linear(a, [matrix], out, None, None, False)
        act = device.poisoned("act", FLOAT16, n, rows)
        gemm.gated(a, gate, up, Operand(act, rows, scale), None, (None, None), "silu")
        return device.get(out), device.get(act)

    expected = results()
    assert close_to(products(device, a, [matrix]), expected[0])
    for config in int8_hopper.CONFIGS:
        monkeypatch.setattr(gemm, "_facts", SimpleNamespace(multiprocessors=config.cluster))
        if config.tiles == 2 and (device.backend is not None or config.tokens in (16, 64)):
            monkeypatch.setattr(int8_hopper, "best_config", lambda *_, config=config: config)
            assert all(map(np.array_equal, results(), expected)), config
