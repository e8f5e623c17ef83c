"""Experts' outputs in int8: rounded by blocks until they are added up (models/precision.py)."""

import numpy as np
import pytest

from kqprefill.backends.cpu import ops
from kqprefill.backends.cpu.int8 import in_blocks
from kqprefill.backends.cuda.device.arrays import FLOAT16, INT8
from kqprefill.backends.cuda.gemm import int8, int8_hopper, portable
from kqprefill.backends.cuda.gemm.operand import HALVES, Operand, operand_positions, output_row_bytes
from kqprefill.engine.model import open_model
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile
from test_int8 import device, grouped  # noqa: F401  # device: a fixture


def of_blocks(x):
    """Rows [n, columns] as [n, blocks, 16], the last 32 columns filled up with zeros."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32)))
    return padded.reshape(len(x), -1, 2, 2, 8).transpose(0, 1, 3, 2, 4).reshape(len(x), -1, 16)


def stored(raw, columns):
    """(the integers of rows as kernels store them, [n, blocks, 16]; the blocks' largest magnitudes)"""
    width = -(-columns // 32) * 32
    integers, largest = np.ascontiguousarray(raw[:, :width]), np.ascontiguousarray(raw[:, width : width + width // 8])
    return integers.reshape(len(raw), -1, 16), largest.view(np.float16).astype(np.float64)


def check_blocks(halves, raw):
    """What is stored is what such halves are rounded to, by a factor that is a half itself."""
    expected, (integers, largest) = of_blocks(halves.astype(np.float64)), stored(raw, halves.shape[1])
    most = np.abs(expected).max(axis=-1)
    assert np.array_equal(most, largest, equal_nan=True)
    finite = np.isfinite(most)
    step = largest[finite][:, None] / 127
    off = np.abs(integers[finite] * step - expected[finite])
    assert (np.abs(integers[finite].astype(int)) <= 127).all() and (off <= (0.5 + 127 / 2**11) * step).all()
    assert not np.isfinite(largest[~finite]).any()
    assert (integers[largest == 0] == 0).all()


def strange_operand(device, n, columns, rng):  # noqa: F811
    """Rows of all sizes: of zeros, with an infinity, and what becomes halves without all their bits."""
    x = rng.standard_normal((n, columns)) * rng.uniform(0.01, 20, (n, 1))
    x[0], x[1, 5], x[2] = 0, np.inf, x[2] * 1e-4
    values = np.zeros((n, HALVES.padded(columns)), np.float16)
    values[:, operand_positions(columns)] = x
    return Operand(device.work.upload("x", values), columns, device.small.constant(np.array([32.0], np.float32)))


@pytest.mark.parametrize("features", [96, 320])
def test_products_in_blocks(device, features, rng, monkeypatch):  # noqa: F811
    """Of every tile: the halves that it would give, rounded; the same bits of all, in whatever order blocks run."""
    counts = (20, 3, 0, 17) if device.backend is None else (300, 17, 0, 130, 1, 64, 65)
    columns, experts, n = 256, len(counts), sum(counts)
    stack, _ = device.matrix("ffn_down_exps", (experts, features, columns), GGML.Q8_0)
    one, scale = stack.one_of(experts), device.small.constant(np.array([2.0**-6], np.float32))
    bias = rng.standard_normal((experts, features)).astype(np.float32)
    bias[0] = 0  # so that there are blocks of zeros
    held, a = device.work.upload("bias", bias), strange_operand(device, n, columns, rng)
    gemm, found = device.gemms.choose([one]), set()
    if isinstance(gemm, int8_hopper.HopperInt8Gemm):
        module = int8_hopper
        configs = [own for own in int8_hopper.CONFIGS if device.backend is not None or own.tokens <= 64]
    else:
        sizes = (portable.LARGE, portable.MEDIUM, portable.SMALL)
        module, configs = int8, [portable.fitting(size, device.gpu.shared_memory) for size in sizes]
    for config in configs:
        monkeypatch.setattr(module, "best_config", lambda *_, config=config: config)
        groups = grouped(device, counts, gemm.group_rows(n, [one], False, experts))
        halves = device.poisoned("sums", FLOAT16, n, features)
        gemm.linear(a, [one], halves, None, held, False, groups, scale)
        for order in "0", "1":
            monkeypatch.setenv("KQ_EMULATED_ORDER", order)
            out = device.poisoned("blocks", INT8, n, output_row_bytes(features))
            gemm.linear(a, [one], out, None, held, False, groups, scale, ldo=out.shape[1])
            raw = device.get(out)
            check_blocks(device.get(halves), raw)
            found.add(np.delete(raw, 1, axis=0).tobytes())  # of what is not finite any integers will do
    assert len(found) == 1


def test_the_cpus_blocks(rng):
    x = rng.standard_normal((5, 200)).astype(np.float32) * np.float32(1e-3)
    x[0, :48], x[1, 3], x[2, 20], x[3, 180] = 0, np.nan, np.inf, 1e30
    made = in_blocks(x)
    assert made.shape == x.shape and made.dtype == np.float32
    expected, got = of_blocks(x.astype(np.float64)), of_blocks(made.astype(np.float64))
    with np.errstate(invalid="ignore"):
        most = np.abs(expected).max(axis=-1, keepdims=True)
        close = np.abs(got - expected) <= 0.501 * most / 127
    strange = np.zeros(close.shape, bool)
    strange[1, 0] = strange[2, 0] = True
    assert close[~strange].all() and not np.isfinite(got[strange]).any()
    assert np.array_equal(made[:, 32:64], in_blocks(x[:, 32:64]))  # blocks know nothing of each other


def test_what_experts_give_is_rounded_in_int8_alone(rng, monkeypatch):
    """In exact layers, and in an exact model, it is not."""
    shape = Shape("qwen3moe", 3, 128, 4, 2, 32, 96, 131, 4096, 1e4, experts=4, used=2)
    tokens, rounded = rng.integers(0, 131, 20), []
    monkeypatch.setattr(ops, "in_blocks", lambda x: rounded.append(x.shape) or in_blocks(x))
    for precision in "exact", "int8":
        with open_model(SyntheticFile(shape, lambda *_: GGML.Q8_0, "rounded"), "cpu", precision=precision) as model:
            model.prefill(tokens)
        layers = 2 if precision == "int8" else 0  # the first one is exact
        assert sum(rows for rows, _ in rounded) == layers * 2 * len(tokens)
    assert {columns for _, columns in rounded} == {128}
