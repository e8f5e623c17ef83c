"""Experts whose rows of W are short, in int8 on Hopper: their kernel gives the bits of the one for rows of any length,
however tokens are grouped; and kernels/experts.cu's arrange lists the groups in the order that it is fast with."""

from types import SimpleNamespace

import numpy as np
import pytest

from kqprefill.backends.cuda.device.arrays import FLOAT16, INT8, INT32
from kqprefill.backends.cuda.gemm import int8_short
from kqprefill.backends.cuda.gemm.int8_hopper import HopperInt8Gemm
from kqprefill.backends.cuda.gemm.operand import output_row_bytes
from kqprefill.backends.cuda.programs import EXPERTS
from kqprefill.backends.cuda.weights.matrix import matrix_of
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import SyntheticTensor
from test_int8 import device, grouped  # noqa: F401  # device: a fixture

COUNTS = (140, 0, 3, 300, 64, 257)


@pytest.mark.parametrize("columns,in_blocks", [(672, False), (768, False), (768, True)])
def test_the_bits_of_the_kernel_for_any_rows(device, columns, in_blocks, rng, monkeypatch):  # noqa: F811
    """Of groups of one set of tokens and of several, with biases, and by blocks that make many output tiles."""
    counts = COUNTS if device.backend is None else (*COUNTS, 1500, 1, 128, 65)
    features, experts, n = 288, len(counts), sum(counts)
    stack, _ = device.matrix("ffn_down_exps", (experts, features, columns), GGML.Q8_0)
    one = stack.one_of(experts)
    bias = device.work.upload("bias", rng.standard_normal((experts, features)).astype(np.float32))
    scale = device.small.constant(np.array([8.0], np.float32))
    a, _ = device.operand(n, columns, rng)
    gemm = device.gemms.choose([one])
    if not isinstance(gemm, HopperInt8Gemm):
        pytest.skip("a kernel of Hopper's")

    def sums():
        rows = gemm.group_rows(n, [one], False, experts)
        form = (INT8, n, output_row_bytes(features)) if in_blocks else (FLOAT16, n, features)
        out = device.poisoned("sums", *form)
        gemm.linear(a, [one], out, None, bias, False, grouped(device, counts, rows), scale, ldo=out.shape[1])
        return device.get(out)

    monkeypatch.setattr(int8_short, "_FEW_ROWS", 10**6)
    expected = sums()
    assert np.isfinite(expected).all() and not gemm.fullest_first(n, one, experts)
    monkeypatch.setattr(int8_short, "_FEW_ROWS", 0)
    assert gemm.fullest_first(n, one, experts)
    for sets, multiprocessors in ((1, 2), (2, 6), (8, 132)):
        monkeypatch.setattr(gemm, "_facts", SimpleNamespace(multiprocessors=multiprocessors))
        monkeypatch.setattr(int8_short, "group_rows", lambda *_, sets=sets: 128 * sets)
        assert np.array_equal(sums(), expected), (sets, multiprocessors)


def test_blocks_never_read_a_stage_that_is_filled_again(device, rng):  # noqa: F811
    """Many launches in a row: without finish_loads some in a hundred had sums of another output tile's W."""
    if device.backend is None:
        pytest.skip("the emulator copies at once")
    counts, features, columns = (900, 700, 2500, 1100), 2048, 768
    experts, n = len(counts), sum(counts)
    stack, _ = device.matrix("ffn_down_exps", (experts, features, columns), GGML.Q8_0)
    one, scale = stack.one_of(experts), device.small.constant(np.array([8.0], np.float32))
    a, _ = device.operand(n, columns, rng)
    gemm = device.gemms.choose([one])
    if not isinstance(gemm, HopperInt8Gemm):
        pytest.skip("a kernel of Hopper's")
    assert gemm.fullest_first(n, one, experts)
    groups = grouped(device, counts, 256)
    found = set()
    for _ in range(200):
        out = device.poisoned("sums", FLOAT16, n, features)
        gemm.linear(a, [one], out, None, None, False, groups, scale)
        found.add(device.get(out).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("rows", "features", "columns", "experts", "fits", "of_a_group"),
    [
        (65536, 2048, 768, 128, True, 1024),
        (32768, 2048, 768, 128, True, 512),  # eight output tiles a cluster, about
        (32767, 2048, 768, 128, False, 512),  # fewer than 256 rows an expert
        (65536, 2048, 512, 128, False, 1024),
        (65536, 2048, 800, 128, False, 1024),
        (1024, 96, 672, 4, True, 128),
        (65536, 2048, 768, 0, False, 1024),  # no experts
    ],
)
def test_which_products_and_groups(rows, features, columns, experts, fits, of_a_group):
    matrix = matrix_of(SyntheticTensor("blk.0.ffn_down.weight", (features, columns), GGML.Q8_0))
    assert int8_short.fits(rows, matrix, experts) == fits
    assert int8_short.group_rows(rows, matrix, 132) == of_a_group


@pytest.mark.parametrize("fullest_first", [0, 1])
def test_groups_are_listed(device, fullest_first, rng):  # noqa: F811
    """All rows, once, by their experts; where asked, whole groups first, and then the others by their sizes."""
    experts, entries, gated_rows, linear_rows = 37, 1200, 64, 32
    odds = rng.exponential(size=experts) ** 3
    chosen = rng.choice(experts, entries, p=odds / odds.sum()).astype(np.int32)
    expert_of, blocks = device.work.upload("chosen", chosen), -(-entries // 512)
    counts = device.poisoned("counts", INT32, blocks, experts)
    lists = {
        name: (device.poisoned(f"{name} groups", INT32, entries // rows + experts, 4), rows)
        for name, rows in (("gated", gated_rows), ("linear", linear_rows))
    }
    totals = {name: device.poisoned(f"{name} count", INT32, 1) for name in lists}
    device.launcher.launch(
        EXPERTS, "count", grid=blocks, expert_of=expert_of, entries=entries, experts=experts, counts=counts
    )
    device.launcher.launch(
        EXPERTS,
        "arrange",
        grid=1,
        counts=counts,
        blocks=blocks,
        experts=experts,
        **{f"{name}_groups": groups for name, (groups, _) in lists.items()},
        **{f"{name}_tokens": rows for name, (_, rows) in lists.items()},
        **{f"{name}_count": count for name, count in totals.items()},
        fullest_first=fullest_first,
    )
    sizes = np.bincount(chosen, minlength=experts)
    firsts = np.cumsum(sizes) - sizes
    for name, (groups, rows) in lists.items():
        expected = [
            (first + at, min(first + at + rows, first + size), expert)
            for expert, (first, size) in enumerate(zip(firsts, sizes))
            for at in range(0, size, rows)
        ]
        if name == "linear" and fullest_first:
            expected.sort(key=lambda group: group[0] - group[1])
        assert device.get(totals[name]) == [len(expected)]
        assert device.get(groups)[: len(expected), :3].tolist() == [list(map(int, group)) for group in expected]
