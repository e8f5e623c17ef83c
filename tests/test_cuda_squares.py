"""Sums of squares on the GPU: where the kernels find rows and columns, what the ops tell, and (gpu) the sums."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import CASES, EXAMPLE
import kqprefill
from kqprefill.backends.cuda.device.arrays import FLOAT64, DeviceArray
from kqprefill.backends.cuda.gemm.operand import operand_positions
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.ops import collector as device_collector
from kqprefill.backends.cuda.ops.collector import DeviceCollector
from kqprefill.backends.cuda.rehearsal import (
    CudaOps,
    LaunchRecorder,
    NoGpu,
    _MeasuredWorkspace,
    collected_bytes,
    plan_model,
    planned_batch,
    stand_in,
)
from kqprefill.core import Batch, Segment
from kqprefill.engine.imatrix import importance_matrix
from kqprefill.gguf import GGUFFile
from kqprefill.models import FAMILIES, read_model
from kqprefill.synthetic import SyntheticFile
from launches import KERNELS, CheckedLaunches, Facts

WARPS, PIECE = 16, 128  # kernels/squares.cu
CONTEXT = 64


def emulated(x, length, offset, sums):
    """kernels/squares.cu: add_sequences of values [rows, columns]; float64 sums, a row after the other."""
    rows, in_sequence = len(x), -(-length // PIECE)
    pieces = -(-(offset + rows) // length) * in_sequence
    seen = np.zeros(rows, int)
    total = sums.copy()
    for begin in range(0, -(-pieces // WARPS) * WARPS, WARPS):
        partial = np.zeros((WARPS, x.shape[1]))
        for warp in range(WARPS):
            piece = begin + warp
            first = piece // in_sequence * length
            end = min(first + length, offset + rows)
            first += piece % in_sequence * PIECE
            end = min(end, first + PIECE)
            for row in range(max(first - offset, 0), end - offset):
                partial[warp] += np.square(x[row], dtype=np.float64)
                seen[row] += 1
        for own in partial:
            total += own
    assert (seen == 1).all()
    return total


@pytest.mark.parametrize("length", [1, 64, 127, 128, 300, 512])
def test_every_row_is_summed_once_and_in_the_same_order(length, rng):
    """However many sequences a batch has."""
    x = rng.standard_normal((4 * length, 3)).astype(np.float32)
    whole = emulated(x, length, 0, np.zeros(3))
    np.testing.assert_allclose(whole, np.square(x, dtype=np.float64).sum(axis=0), rtol=1e-12)
    parts = emulated(x[length:], length, 0, emulated(x[:length], length, 0, np.zeros(3)))
    assert np.array_equal(whole, parts)
    cut = int(rng.integers(1, 4 * length)) if length > 1 else 2
    parts = emulated(x[cut:], length, cut % length, emulated(x[:cut], length, 0, np.zeros(3)))
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def rehearsed(family, kernels="hopper", batch=None):
    """A collector, and what is launched, of a batch without a GPU."""
    facts = Facts(KERNELS[kernels][0])
    launcher = CheckedLaunches(facts.shared_memory)
    context = stand_in(facts, kernel_set_of(facts.capability), launcher, _MeasuredWorkspace(NoGpu(facts)))
    ops = CudaOps(context, family, batch or planned_batch(100, False), None)
    ops.collector = DeviceCollector(True, context.gpu, launcher)
    family.finish(ops, family.forward(ops), None)
    return ops.collector, launcher.launched


@pytest.mark.parametrize("name", sorted({path.stem.partition("-q")[0]: path.stem for path in CASES.values()}.values()))
def test_both_backends_tell_the_same(name):
    """The same tensors, sharing the same sums of the same sizes, for every family."""
    with GGUFFile(CASES[name]) as file:
        if file.metadata["general.architecture"] not in FAMILIES:
            pytest.skip("a family that is not supported")
        told, _ = rehearsed(read_model(file))
        with kqprefill.load(CASES[name], backend="cpu") as model:
            tokens = np.arange(16) % min(30, model.config.vocab_size)
            own = importance_matrix(model, tokens, 16, output=True).squares
        gpu = {tuple(sorted(told._names[key])): sums for key, sums in told._sums.items()}
        assert set(gpu) == set(own)
        for names, sums in gpu.items():
            experts = 1 if sums.rows is None else sums.rows.shape[0]
            assert (experts * len(sums.picks), experts) == (len(own[names].sums), len(own[names].counts)), names
            assert len(set(sums.picks)) == len(sums.picks) and sums.picks.max() < sums.array.shape[1]


@pytest.mark.parametrize("kernels", KERNELS)
def test_sums_are_launched_once_for_what_shares_an_input(kernels):
    """Four for each layer of a dense model; nothing without a collector."""
    family = read_model(SyntheticFile.named("qwen3-8b:Q4_K_M"))
    segments = tuple(Segment(i * 512, 512) for i in range(4))
    batch = Batch(np.zeros(2048, np.int32), segments=segments)
    _, launched = rehearsed(family, kernels, batch)
    squares = [arguments for program, _, _, arguments in launched if program.source == "squares.cu"]
    assert len(squares) == 4 * len(family.blocks) + 1  # the output matrix's
    assert {(a["rows"], a["length"], a["offset"]) for a in squares} == {(2048, 512, 0)}
    assert not any(kernel == "rank" for _, kernel, _, _ in launched)


def test_sums_are_planned_for():
    family, facts = read_model(SyntheticFile.named("qwen3-8b:Q4_K_M")), Facts((9, 0))
    kernel_set = kernel_set_of(facts.capability)
    needed = collected_bytes(family, facts, kernel_set, output=False)
    per_layer = 8 * (3 * 4096 + 12288)
    assert needed == 36 * per_layer
    plain, more = (plan_model(family, facts, kernel_set, 80 << 30, 512, sums_bytes=n) for n in (0, needed))
    assert "sums of squares" not in plain.parts and more.parts["sums of squares"] == needed
    assert more.nbytes >= plain.nbytes + needed


def test_rehearsals_say_all_that_a_run_takes(monkeypatch):
    """Of experts whatever the batch."""
    family, facts = read_model(SyntheticFile.named("deepseek-v2-lite:Q4_K_M")), Facts((9, 0))
    needed = collected_bytes(family, facts, kernel_set_of(facts.capability), output=True)
    told, _ = rehearsed(family, batch=planned_batch(9000, False))
    assert told.taken == needed


def test_sums_come_back_as_the_file_orders_them(rng):
    """From operand order, without the inputs' scale."""
    values, scale = rng.random((2, 128)), np.array([8.0], np.float32)
    arrays = {0: values, 1: scale, 2: np.array([3.0, 5.0])}

    class Gpu(NoGpu):
        def download(self, array, address):
            array[...] = arrays[address].reshape(array.shape)

    told = DeviceCollector(True, Gpu(Facts((9, 0))), LaunchRecorder())
    picks = operand_positions(100)
    told._sums["blk.0.x"] = device_collector._Sums(
        DeviceArray(0, FLOAT64, (2, 128)),
        picks,
        DeviceArray(1, np.dtype(np.float32), (1,)),
        DeviceArray(2, FLOAT64, (2,)),
    )
    own = told.sums()["blk.0.x"]
    assert own.counts.tolist() == [3, 5]
    assert np.array_equal(own.sums, (values[:, picks] / 64).ravel())


# On a GPU ------------------------------------------------------------------------------------------------------------

MODELS = "qwen3-q4_k qwen3vlmoe-q4_k_m gemma4-q4_k_m gemma4-e2b-q3_k_m qwen35moe-q4_k_m deepseek2-moe-glm47-q3_k_m "
MODELS += "deepseek2-moe-kv_b-q3_k_m qwen2moe-q4_k gpt-oss-mxfp4 olmo2-q4_k granite-q4_k"


def squares_on(path, tokens, backend, batch_tokens=None, **more):
    with kqprefill.load(path, backend=backend, **more) as model:
        return importance_matrix(model, tokens, CONTEXT, output=True, batch_tokens=batch_tokens).squares


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("case", [name for name in MODELS.split() if name in CASES])
def test_sums_are_the_cpus(case, kernels, rng):
    """Of experts the counts may differ where scores are all but equal: the sums are held against the means then. What a
    token's other experts gave it goes on to the layers above, so that their sums differ more, too."""
    tokens = rng.integers(0, 64, 5 * CONTEXT)
    own, cpu = (squares_on(CASES[case], tokens, b, kernels=k) for b, k in (("cuda", kernels), ("cpu", "auto")))
    assert set(own) == set(cpu)
    routed = any(len(squares.counts) > 1 for squares in cpu.values())
    for names, expected in cpu.items():
        got, experts = own[names], len(expected.counts)
        assert got.counts.sum() == expected.counts.sum()
        if not routed:
            np.testing.assert_allclose(got.sums, expected.sums, rtol=2e-2, atol=1e-3 * expected.sums.mean())
        limit = 5e-2 if experts > 1 else 1e-2 if routed else 2e-3
        assert np.abs(got.sums - expected.sums).sum() <= limit * expected.sums.sum(), names


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name in MODELS.split() if name in CASES])
def test_same_bits_whatever_the_batch(case, rng):
    """One chunk at a time, or all at once, or with layers that are streamed."""
    tokens = rng.integers(0, 64, 7 * CONTEXT)
    one = squares_on(CASES[case], tokens, "cuda", batch_tokens=8192)
    for batch_tokens in (CONTEXT, 3 * CONTEXT):
        other = squares_on(CASES[case], tokens, "cuda", batch_tokens)
        for names, expected in one.items():
            assert np.array_equal(other[names].sums, expected.sums), names
            assert np.array_equal(other[names].counts, expected.counts), names


@pytest.mark.gpu
def test_streamed_layers_sum_the_same(monkeypatch, rng):
    from kqprefill.backends.cuda import backend
    from test_residency import force

    tokens = rng.integers(0, 200, 6 * CONTEXT)
    expected = squares_on(EXAMPLE, tokens, "cuda")
    force(monkeypatch, [])
    assert backend.plan_model is not plan_model
    got = squares_on(EXAMPLE, tokens, "cuda", batch_tokens=2 * CONTEXT)
    for names, squares in expected.items():
        assert np.array_equal(got[names].sums, squares.sums), names


@pytest.mark.gpu
def test_checkpoints_while_the_next_batch_runs(rng):
    tokens = rng.integers(0, 200, 6 * CONTEXT)
    with kqprefill.load(EXAMPLE, backend="cuda") as model:
        kept = {}
        importance_matrix(
            model, tokens, CONTEXT, stops=1, on_chunks=lambda done, so_far: kept.setdefault(done, so_far())
        )
        part = importance_matrix(model, tokens, CONTEXT, most=4)
    assert sorted(kept) == list(range(1, 7))
    for names, squares in part.squares.items():
        assert np.array_equal(kept[4].squares[names].sums, squares.sums)
    assert replace(part, key="").chunks == 4
