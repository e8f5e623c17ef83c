"""Batches of models whose matrices are all kept as halves, or some, or none: the same bits, within the plan's memory;
on emulated kernels, and (gpu) on a device."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import EXAMPLE, found
from emulator import why_not
from host_backend import HostBackendGpu, run_on_host
from host_gpu import on_host
import kqprefill
from kqprefill.backends.cuda.bounds import H100
from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32, DeviceArray
from kqprefill.backends.cuda.gemm.operand import Operand
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.kv_cache import DeviceCache
from kqprefill.backends.cuda.rehearsal import plan_model
from kqprefill.backends.cuda.weights import plan as plan_module
from kqprefill.backends.cuda.weights.halves import KeptHalves
from kqprefill.backends.cuda.weights.plan import CONTEXT_BYTES
from kqprefill.backends.devices import SAME_DEVICE
from kqprefill.cli import kld
from kqprefill.cli.run_options import RunOptions
from kqprefill.engine.model import open_model
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile
from small_models import more_metadata
from test_residency import force

GIB = 1 << 30
AS_HALVES = "weights as halves"
PORTABLE, KEEPS_NONE = (kernel_set_of(H100.capability, "portable") for _ in range(2))
KEEPS_NONE.keeps_halves = False


emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
SMALL = 160, 4, 2, 40, 200, 131, 4096, 1e4  # rows of 200 do not fill an operand's last group
LATENT = {
    "attention.q_lora_rank": 96,
    "attention.kv_lora_rank": 96,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 16,
    "leading_dense_block_count": 1,
    "expert_shared_count": 1,
}
SHAPES = {
    "dense": Shape("llama", 2, *SMALL),
    "experts": Shape("gpt-oss", 2, 128, 4, 2, 32, 96, 131, 4096, 1e4, window=40, yarn=4.0, experts=4, used=2),
    "without a gate": Shape("starcoder2", 2, *SMALL, more=more_metadata("starcoder2")),
    "latent": Shape("deepseek2", 2, 160, 4, 1, 48, 64, 131, 4096, 1e4, experts=4, used=2, more=LATENT),
}
IN_WORK_MEMORY = {"latent": 2}  # matrices that each batch makes anew


def type_of(name, layer):
    """Of units of three sizes, so that q, k and v are of several; routers in floats."""
    return GGML.F32 if name == "ffn_gate_inp" else (GGML.Q8_0, GGML.Q5_0, GGML.F16)[sum(name.encode()) % 3]


def file_of(name):
    return SyntheticFile(SHAPES[name], type_of, name) if name in SHAPES else GGUFFile(EXAMPLE)


@pytest.fixture
def host(monkeypatch):
    """Devices on the host, whose plans have little but what a small model takes."""
    run_on_host(monkeypatch)
    monkeypatch.setattr(plan_module, "STAGING_BYTES", 64 << 10)
    monkeypatch.setattr(plan_module, "_SLACK_BYTES", 5 << 18)  # norms and scales take a mebibyte
    monkeypatch.setattr(plan_module, "_SLACK_SHARE", 0.0)
    return monkeypatch


def opened(name, room=1 << 30, tokens=130, **how):
    """A model on the host whose plan for so many tokens has so many bytes of room for halves."""
    file = file_of(name)
    least = plan_model(read_model(file), HostBackendGpu(), KEEPS_NONE, 1 << 40, tokens).nbytes
    return open_model(file, "cuda", vram=least + room, max_tokens=tokens, **how)


def counted(model, tokens):
    """(the logits of a prompt, how many matrices' halves were made for it)"""
    counts = model.backend.launcher.counts
    before = counts.get("dequantize", 0)
    logits = model.prefill(tokens, logits="all").logits
    return logits, counts.get("dequantize", 0) - before


def dequantised(model, tokens):
    """The same, within the memory that is planned."""
    result = counted(model, tokens)
    assert model.backend.weights.halves.nbytes <= model.backend.plan.halves_bytes
    assert model.backend.gpu.held <= model.backend.plan.nbytes - CONTEXT_BYTES
    assert model.backend.gpu.peak <= model.backend.plan.budget - CONTEXT_BYTES
    return result


@emulated
@pytest.mark.parametrize("name", ["example", *SHAPES])
def test_all_some_and_none_are_the_same_bits(name, host, rng):
    prompts = [rng.integers(0, 131, n) for n in (40, 40, 5, 129)]
    with opened(name, 0) as model:
        expected = [dequantised(model, tokens) for tokens in prompts]
        assert model.backend.weights.halves.nbytes == 0 and AS_HALVES not in model.backend.plan.parts
        every = expected[0][1]
        assert all(count == every for _, count in expected)
    with opened(name) as model:
        results = [dequantised(model, tokens) for tokens in prompts]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(results, expected))
        assert [count for _, count in results] == [every] + 3 * [IN_WORK_MEMORY.get(name, 0)]
        most = model.backend.weights.halves.nbytes
    room = int(rng.integers(most // 8, most))
    with opened(name, room) as model:
        results = [dequantised(model, tokens) for tokens in prompts]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(results, expected)), f"room: {room}"
        assert 0 < model.backend.weights.halves.nbytes <= room
        others = results[1][1]
        assert [count for _, count in results] == [every] + 3 * [others] and others < every


@emulated
def test_a_longer_prompt_than_planned_takes_their_room(host, rng):
    prompts = [rng.integers(0, 131, n) for n in (40, 150, 40)]
    with opened("dense", 0, 150) as model:
        expected = [dequantised(model, tokens)[0] for tokens in prompts]
    with opened("dense", tokens=40) as model:
        most = model.backend.plan.halves_bytes
    with opened("dense", most, 40) as model:
        held = []
        for tokens, logits in zip(prompts, expected):
            assert np.array_equal(dequantised(model, tokens)[0], logits)
            held.append(model.backend.weights.halves.nbytes)
        assert not model.backend.plan.streamed and held[0] > held[1] == held[2] > 0
        budget = model.backend.plan.budget
        assert budget - model.backend.plan.nbytes < 256


@emulated
def test_a_prompt_that_makes_layers_leave_gives_all_back(host, rng):
    shape = replace(SHAPES["dense"], layers=6)
    host.setitem(SHAPES, "deep", shape)
    prompts = [rng.integers(0, 131, n) for n in (20, 120, 20)]
    with opened("deep", 0, 120) as model:
        expected = [dequantised(model, tokens)[0] for tokens in prompts]
    with opened("deep", 200_000, 20) as model:
        halves, gpu = model.backend.weights.halves, model.backend.gpu
        assert np.array_equal(dequantised(model, prompts[0])[0], expected[0]) and halves.nbytes > 0
        gpu.limit = 0
        with pytest.raises(kqprefill.BackendError, match="out of memory"):
            model.prefill(prompts[1])
        assert halves.nbytes == 0  # the layers that were to leave have left
        gpu.limit = 1 << 40
        for tokens, logits in zip(prompts[1:], expected[1:]):
            assert np.array_equal(dequantised(model, tokens)[0], logits) and halves.nbytes == 0
        assert model.backend.plan.streamed


@emulated
def test_streamed_layers_are_never_kept(host, rng):
    """Whatever a plan says of room: their memory has another layer's weights the next moment."""
    tokens = rng.integers(0, 131, 40)
    with opened("dense", 0) as model:
        expected, every = dequantised(model, tokens)
    force(host, [0])
    with opened("dense") as model:
        assert model.backend.plan.streamed and model.backend.plan.halves_bytes > 0
        for _ in range(3):
            logits, count = counted(model, tokens)
            assert np.array_equal(logits, expected) and count == every
        assert model.backend.weights.halves.nbytes == 0


@emulated
def test_a_cache_takes_their_room(host, rng):
    tokens = rng.integers(0, 131, 100)
    with opened("dense", 0) as model:
        expected, _ = dequantised(model, tokens)
        needed = DeviceCache.bytes_needed(model.family.layer_states, 100)
    with opened("dense") as model:
        dequantised(model, tokens)
        most = model.backend.weights.halves.nbytes
    with opened("dense", most) as model:
        dequantised(model, tokens)
        assert model.backend.weights.halves.nbytes == most
        cache = model.new_cache(100)
        assert type(cache) is DeviceCache
        assert 0 < model.backend.weights.halves.nbytes <= most - needed + 512
        parts = [model.prefill(tokens[at : at + 50], "all", cache).logits for at in (0, 50)]
        assert np.array_equal(np.concatenate(parts), expected)
        assert np.array_equal(dequantised(model, tokens)[0], expected)
        held = model.backend.weights.halves.nbytes
        cache.close()
        assert type(model.new_cache(100)) is DeviceCache and model.backend.weights.halves.nbytes == held


@emulated
def test_sums_of_squares_take_their_room(host, rng):
    tokens = rng.integers(0, 131, 50)
    with opened("dense") as model:
        dequantised(model, tokens)
        before = model.backend.weights.halves.nbytes
    with opened("dense", before) as model:
        dequantised(model, tokens)
        assert model.backend.weights.halves.nbytes == before
        model.backend.new_collector(model.family, False)
        assert 0 < model.backend.weights.halves.nbytes < before and model.backend.plan.parts["sums of squares"]


@emulated
def test_graphs_read_what_is_kept_and_never_what_was_given_back(host, rng):
    """Memory that was given back is NaN here; a length's third prompt is a graph's launch."""
    tokens = rng.integers(0, 131, 30)
    with opened("dense", 0) as model:
        expected, every = dequantised(model, tokens)
        captured = [dequantised(model, tokens)[1] for _ in range(3)]
        assert captured == [every] * 3
    with opened("dense") as model:
        backend = model.backend
        most = backend.plan.halves_bytes

        def run():
            logits, count = dequantised(model, tokens)
            assert np.array_equal(logits, expected)
            return count

        assert [run() for _ in range(4)] == [every, 0, 0, 0]
        assert backend._graphs._graphs, "a graph was made of it"
        held = backend.weights.halves.nbytes
        for room in (held // 2, held // 4):
            backend._place(backend.plan.with_halves(room), False, lambda *_: None)
            assert backend.weights.halves.nbytes <= room
            some = run()
            replayed = [run() for _ in range(3)]  # a product that the room left by a larger one holds was kept first
            assert 0 < min(replayed) == max(replayed) <= some < every
        backend._place(backend.plan.with_halves(most), False, lambda *_: None)
        assert 0 < run() < every and [run() for _ in range(3)] == [0, 0, 0]


@emulated
def test_a_matrix_under_two_scales_is_never_taken_for_the_other(host, rng):
    with opened("dense") as model:
        context, family = model.backend.context, model.family
        gpu, weights = context.gpu, context.weights
        matrix = weights.matrix(family.blocks[0].attn_output)
        x = rng.integers(-4, 5, (5, 192)).astype(np.float16)
        given = gpu.allocate(x.nbytes, "x")
        gpu.upload(given.handle, x)
        a = Operand(DeviceArray(given.handle, FLOAT16, x.shape), 160, context.scales.unit())
        out = context.work.array("out", FLOAT32, 5, matrix.rows)
        made = []
        for factor in (4.0, 64.0, 4.0, 64.0):
            scale = context.small.constant(np.array([factor], np.float32))
            context.gemms.choose([matrix]).linear(a, [matrix], out, scale, None, False)
            made.append(on_host(out).copy())
        assert np.isfinite(made[0]).all() and np.abs(made[0]).max() > 0
        assert all(np.array_equal(made[0], other) for other in made[1:])  # powers of two change no bit
        assert weights.halves.nbytes == 2 * 160 * 192 * 2


@emulated
def test_a_matrix_of_that_name_elsewhere_is_not_kept(host, rng):
    """What each batch makes in work memory may be called as the tensor that it is made of."""
    with opened("dense") as model:
        weights, matrix = model.backend.weights, model.backend.weights.matrix(model.family.blocks[0].attn_output)
        elsewhere = replace(matrix, address=model.backend.gpu.allocate(matrix.nbytes, "a copy").handle)
        scale, made = model.backend.context.scales.unit(), []
        for one in (elsewhere, matrix, replace(matrix, name="another")):
            made.append(weights.halves.of([one], False, scale, (160, 192), lambda array: None))
        assert made[0] is None and made[1] is not None and made[2] is None


@emulated
def test_a_second_model_finds_the_room_that_the_first_can_do_without(host):
    """kld has two on a device."""
    room = 4 * CONTEXT_BYTES
    on = RunOptions("cuda", "0", "auto", None, "exact", False, True)
    models = kld._open_both(
        file_of("dense"), file_of("experts"), on, room, lambda file, on: open_model(file, "cuda", vram=on.vram)
    )
    assert sum(model.backend.plan.nbytes for model in models) <= room
    assert sorted(model.backend.plan.halves_bytes > 0 for model in models) == [False, True]
    for model in models:
        model.close()


# On a GPU ------------------------------------------------------------------------------------------------------------

NAMES = "gemma3-q4_k_m qwen35-tied-nextn qwen3next-moe-q3_k_m gemma4-e2b-q3_k_m deepseek2-moe-glm47-q3_k_m "
MODELS = [EXAMPLE, *found(NAMES + "gemma3n-tiny nemotron_h_moe-latent starcoder2-q3_k")]


def halves_of(model):
    return model.backend.weights.halves.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_kept_halves_give_the_same_bits_on_a_gpu(path, monkeypatch, rng):
    """Prompts that are launched, captured and replayed; packed records; a cache. In a share of every room."""
    results, seed, give_room = [], int(rng.integers(1 << 31)), KeptHalves.give_room
    for share in (0.0, 0.5, 1.0):

        def give_a_share(self, nbytes, share=share):
            give_room(self, int(share * nbytes))

        own = np.random.default_rng(seed)
        monkeypatch.setattr(KeptHalves, "give_room", give_a_share)
        with kqprefill.load(path, backend="cuda", kernels="portable") as model:
            vocab = model.config.vocab_size
            prompts = [own.integers(0, vocab, n) for n in (5, 200, 700)]
            logits = [model.prefill(tokens, "all").logits for tokens in prompts for _ in range(4)]
            records = [own.integers(0, vocab, n).tolist() for n in own.integers(2, 200, 20)]
            scored = [one.logprobs for one in model.score(records)]
            cache = model.new_cache(300)
            parts = [model.prefill(prompts[1][at : at + 100], "all", cache).logits for at in (0, 100)]
            assert (halves_of(model) > 0) == (share > 0)
            assert halves_of(model) <= share * model.backend.plan.halves_bytes
            results.append([*logits, *scored, *parts])
    for got in results[1:]:
        assert all(map(np.array_equal, results[0], got))


@pytest.mark.gpu
def test_a_longer_prompt_takes_their_room_on_a_gpu(rng):
    tokens = rng.integers(0, 1000, 8000)

    def load(**how):
        return open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", kernels="portable", max_tokens=100, **how)

    with load() as model:
        model.backend.take_least()
        assert halves_of(model) == 0
        expected = [model.prefill(tokens[:n], logits="last").logits for n in (100, 8000)]
        assert halves_of(model) == 0
        budget = model.backend.plan.nbytes + (200 << 20)
    with load(vram=budget) as model:
        held = []
        for n, logits in ((100, expected[0]), (8000, expected[1]), (100, expected[0]), (100, expected[0])):
            assert np.array_equal(model.prefill(tokens[:n], logits="last").logits, logits)
            held.append(halves_of(model))
            assert held[-1] <= model.backend.plan.halves_bytes
            assert model.backend.memory_used() <= budget - CONTEXT_BYTES
        assert held[0] > held[1] == held[2] == held[3] > 0 and not model.backend.plan.streamed


@pytest.mark.gpu
def test_a_pipeline_keeps_them_too(monkeypatch):
    monkeypatch.setenv(SAME_DEVICE, "1")
    tokens = np.arange(500) % 200
    with kqprefill.load(EXAMPLE, backend="cuda", kernels="portable") as model:
        expected = model.prefill(tokens, "all").logits
    with kqprefill.load(EXAMPLE, backend="cuda", kernels="portable", device=[0, 0]) as model:
        for _ in range(3):
            assert np.array_equal(model.prefill(tokens, "all").logits, expected)
        members = [member.backend for member in model.backend._members]
        assert all(0 < member.weights.halves.nbytes <= member.plan.halves_bytes for member in members)
