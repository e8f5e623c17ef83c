"""Matrices side by side of which some are in int8 and others are not, on CUDA: on emulated kernels, on a GPU, and what
models launch."""

from dataclasses import replace

import numpy as np
import pytest

from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32
from kqprefill.backends.cuda.gemm.operand import HALVES, Operand
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.rehearsal import rehearse
from kqprefill.backends.cuda.weights.staging import unpack
from kqprefill.core import Batch
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile, SyntheticTensor
from launches import Facts, launches_of
from test_int8 import close_to, device, grouped, sizes  # noqa: F401  # a fixture, too


@pytest.mark.parametrize("rows", [(64, 32, 32), (96, 33, 31), (34, 33, 33)], ids=str)
def test_mixed(device, rows, rng):  # noqa: F811
    """q in int8 beside exact k and v, with a bias and added to what is there: each has the bits that it has by
    itself, and the scale of halves is the exact ones' own."""
    q = replace(device.matrix("attn_q", (rows[0], 256))[0], name=f"q {rows}")
    exact = [device.exact(f"attn_{name} {rows}", (n, 256), GGML.Q4_K) for name, n in zip("kv", rows[1:])]
    k, v = (matrix for matrix, _ in exact)
    bias = rng.standard_normal(sum(rows)).astype(np.float32)
    held, gemms = device.work.upload("bias", bias), device.gemms
    scale = device.scales.of_weights([q, k, v], None)
    assert np.array_equal(device.get(scale), device.get(device.scales.of_weights([k, v], None)))
    for n in sizes(device):
        a, x = device.operand(n, 256, rng)
        out = device.poisoned("out", FLOAT32, n, sum(rows))
        gemms.choose([q, k, v]).linear(a, [q, k, v], out, scale, held, False)
        got = device.get(out)
        alone = device.poisoned("out of q", FLOAT32, n, rows[0])
        gemms.choose([q]).linear(a, [q], alone, scale, held.rows(0, rows[0]), False)
        assert np.array_equal(got[:, : rows[0]], device.get(alone))
        weights = np.concatenate([w for _, w in exact]).astype(np.float64)
        assert close_to(x.astype(np.float64) @ weights.T + bias[rows[0] :], got[:, rows[0] :], 2e-3)
        gemms.choose([k, q, v]).linear(a, [k, q, v], out, scale, None, False)  # in another order
        plain = device.get(out)
        of_q = slice(rows[1], rows[1] + rows[0])
        assert close_to(plain[:, of_q] + bias[: rows[0]], got[:, : rows[0]])
        gemms.choose([k, q, v]).linear(a, [k, q, v], out, scale, None, True)
        assert np.array_equal(device.get(out), 2 * plain)


@pytest.mark.parametrize("exact_one", ["gate", "up"])
def test_gate_and_up_of_which_one_is_exact(device, exact_one, rng):  # noqa: F811
    """Both are multiplied in int8, as if they had been loaded so; also of experts."""
    act_scale, counts = device.small.constant(np.array([4.0], np.float32)), (5, 0, 9)
    for shape in ((64, 128), (3, 64, 128)):
        names = [f"ffn_{name}{'_exps' if len(shape) == 3 else ''}" for name in ("gate", "up")]
        loaded = [device.matrix(name, shape, GGML.F16)[0] for name in names]
        mixed = list(loaded)
        which = ("gate", "up").index(exact_one)
        mixed[which] = device.exact(names[which], shape, GGML.F16)[0]
        tensor = SyntheticTensor(f"blk.0.{names[which]}.weight", shape, GGML.F16)
        raw = np.ascontiguousarray(tensor.data).reshape(mixed[which].rows, -1)
        unpack(device.launcher, mixed[which], 0, device.work.upload("raw of one", raw), None)  # the same weights
        experts = shape[0] if len(shape) == 3 else 1
        n, outcomes = sum(counts), []
        a, _ = device.operand(n, 128, rng)
        for matrices in (loaded, mixed):
            ones = [matrix.one_of(experts) for matrix in matrices]
            gemm, groups = device.gemms.choose(ones), None
            if experts > 1:
                groups = grouped(device, counts, gemm.group_rows(n, ones, True, experts))
            values = device.poisoned("act", FLOAT16, n, HALVES.padded(64))
            gemm.gated(a, *ones, Operand(values, 64, act_scale), None, (None, None), "silu", groups)
            outcomes.append(device.get(values))
        assert np.array_equal(*outcomes)


def kernels_of(shape, types, kernels):
    """[(kernel, its arguments)] of a batch of a model whose matrices are Q4_K but for `types`, in int8."""
    family = read_model(SyntheticFile(shape, lambda name, layer: types.get(name, GGML.Q4_K), "mixed"))
    facts, kernel_set, batch = Facts((9, 0)), kernel_set_of((9, 0), kernels), Batch(np.zeros(300, np.int32))
    launched, _ = launches_of(family, facts, kernel_set, batch, None, precision="int8")
    programs = {program for program, *_ in launched}
    assert programs <= set(rehearse(family, facts, kernel_set, batch, precision="int8").programs)
    return [(program.source, kernel, arguments) for program, kernel, _, arguments in launched]


DENSE = Shape("qwen3", 2, 512, 8, 2, 64, 768, 320, 4096, 1e6)
EXPERTS = Shape("qwen3moe", 2, 512, 8, 2, 64, 256, 320, 4096, 1e6, experts=16, used=3)


@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_what_q_k_and_v_launch(kernels):
    """In the first layer one product of halves; then q in int8, and k and v of float formats behind it, in the same
    rows."""
    launched = kernels_of(DENSE, {"attn_k": GGML.F16, "attn_v": GGML.F16}, kernels)
    width = 512 + 2 * 128
    side_by_side = [(s, given) for s, kernel, given in launched if kernel == "gemm_linear" and given["ldo"] == width]
    sums, at_q = side_by_side[-1][1]["out"].address - 4 * 512, []
    for source, given in side_by_side:
        if given["out"].address == sums:
            at_q.append("int8" in source)
    assert at_q == [False, True] and "int8" not in side_by_side[-1][0]


@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("which", ["gate", "up"])
def test_networks_of_which_one_matrix_is_in_floats(which, kernels):
    """It is made int8 for each batch, before its product; other matrices in floats are not."""
    for shape, exps in ((DENSE, ""), (EXPERTS, "_exps")):
        types = {f"ffn_{which}{exps}": GGML.F16, f"ffn_down{exps}": GGML.F16}
        launched = [(kernel, "int8" in source) for source, kernel, _ in kernels_of(shape, types, kernels)]
        gated = [at for at, (kernel, _) in enumerate(launched) if kernel == "gemm_gated"]
        assert [launched[at][1] for at in gated][-1] is True  # the first layer is exact
        assert [kernel for kernel, _ in launched].count("make_int8") == 1
        for at in gated[-1:]:
            kernels_before = [kernel for kernel, _ in launched[:at]]
            assert "make_int8" in kernels_before[-2:]
            after = [int8 for kernel, int8 in launched[at:] if kernel == "gemm_linear"]
            assert after[0] is False
