"""The way back from experts: the norm that comes next adds their outputs to the residual stream as it reads it."""

import numpy as np
import pytest

from emulator import why_not
from host_backend import run_on_host
from kqprefill.backends.cuda.constants import SHARED_ROW
from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32, INT8, DeviceArray
from kqprefill.backends.cuda.gemm.operand import BYTES, HALVES, output_row_bytes
from kqprefill.backends.cuda.ops.batch import Combination, Residual
from kqprefill.backends.cuda.programs import EXPERTS, NORM, rounded_norm
from kqprefill.engine.model import open_model
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile
from test_int8 import device  # noqa: F401  # a fixture


def outputs_in_blocks(rows, columns, rng):
    """(experts' outputs as kernels round them, what they stand for)"""
    width = -(-columns // 32) * 32
    integers = rng.integers(-127, 128, (rows, width // 16, 16), np.int8)
    largest = rng.uniform(0, 4, (rows, width // 16, 1)).astype(np.float16)
    raw = np.full((rows, output_row_bytes(columns)), -1, np.int8)
    raw[:, :width], raw[:, width : width // 8 * 9] = integers.reshape(rows, -1), largest.reshape(rows, -1).view(np.int8)
    values = (integers * largest.astype(np.float64) / 127).reshape(rows, -1, 2, 2, 8).transpose(0, 1, 3, 2, 4)
    return raw, values.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("in_blocks", [0, 1])
@pytest.mark.parametrize("columns", [64, 1000, 2048, 5000])
def test_norms_add_what_experts_give(device, columns, in_blocks, rng):  # noqa: F811
    """One after another, and at once, exact and in int8: the same bits, of the stream and of what is made of it."""
    tokens, used = 7, 3
    stride, padded = HALVES.padded(columns), BYTES.padded(columns)
    stream = rng.standard_normal((tokens, columns)).astype(np.float32)
    if in_blocks:
        outputs, values = outputs_in_blocks(tokens * used, columns, rng)
    else:
        values = outputs = rng.standard_normal((tokens * used, columns)).astype(np.float16)
    places, shares = rng.permutation(tokens * used), rng.uniform(0, 1, tokens * used).astype(np.float32)
    shared = shares[:, None] * values.astype(np.float64)[places] / 0.5
    expected = stream + shared.reshape(tokens, used, columns).sum(axis=1)
    weight = device.work.upload("norm", rng.uniform(0.5, 2, columns).astype(np.float32))
    copies = {"sums": device.work.upload("sums", outputs), "in_blocks": in_blocks, "used": used}
    copies["sums_scale"] = device.small.constant(np.array([0.5], np.float32))
    copies["place_of"] = device.work.upload("places", places.astype(np.int32))
    copies["share_of"] = device.work.upload("shares", shares)
    scale = device.small.constant(np.array([64.0], np.float32))
    given = {"weight": weight, "columns": columns, "stride": stride, "epsilon": 1e-6, "scale": scale}
    program = rounded_norm(padded)

    def made(combined, int8):
        x = device.work.upload("stream", stream)
        if not combined:
            nothing = dict.fromkeys(("shared", "h", "h_scale", "gate"))
            device.launcher.launch(
                EXPERTS, "combine", grid=tokens, x=x, columns=columns, stride=0, add=1, **copies, **nothing
            )
        out, more = device.poisoned("out", FLOAT16, tokens, stride), copies if combined else {}
        if not int8:
            more = {"rows": None}
            kernel, grid = (NORM, "rms_norm"), tokens
            if combined:
                kernel, grid = (EXPERTS, "combine_rms_norm"), -(-tokens // 2) if columns <= SHARED_ROW else tokens
                more = {"tokens": tokens, **copies}
            device.launcher.launch(*kernel, grid=grid, x=x, out=out, **given, **more)
            return device.get(x), device.get(out)
        rounded, scales = device.poisoned("int8", INT8, tokens, padded), device.poisoned("scales", FLOAT32, tokens)
        own = {"rows": tokens, "out": out, "rounded": rounded, "padded": padded, "scales": scales}
        kernel = "combine_rms_norm_rounded" if combined else "rms_norm_rounded"
        device.launcher.launch(program.program, kernel, grid=program.blocks(tokens), x=x, **own, **given, **more)
        return tuple(map(device.get, (x, out, rounded, scales)))

    for int8 in (False, True):
        apart, at_once = made(False, int8), made(True, int8)
        assert np.allclose(apart[0], expected, rtol=1e-5, atol=1e-5)
        assert all(np.array_equal(*pair) for pair in zip(apart, at_once))


def test_they_are_added_once():
    """By whoever asks first: a norm that takes them, or a reader of the stream's values."""
    added, array = [], DeviceArray(0, FLOAT32, (1, 64))
    x = Residual(array, combination=Combination({"used": 2}, lambda: added.append(1)))
    assert x.values == x.values == array and added == [1]
    assert x.combination.take() is None
    x = Residual(array, combination=Combination({"used": 2}, lambda: added.append(1)))
    assert x.combination.take() == {"used": 2}
    assert x.values == array and added == [1]


@pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
def test_the_last_layers_outputs_are_in_a_batchs_graph(monkeypatch, rng):
    """A prompt's logits are the same when it is launched, captured, and replayed."""
    run_on_host(monkeypatch)
    shape = Shape("qwen3moe", 2, 128, 4, 2, 32, 96, 131, 4096, 1e4, experts=4, used=2)
    tokens = rng.integers(0, 131, 5)
    with open_model(SyntheticFile(shape, lambda *_: GGML.Q8_0, "graphs"), "cuda", vram=1 << 30, max_tokens=16) as model:
        first, *others = (model.prefill(tokens, logits="last").logits for _ in range(4))
        counts = model.backend.launcher.counts
    assert all(np.array_equal(first, other) for other in others)
    assert counts["combine_rms_norm"] == counts["combine"] == 4
