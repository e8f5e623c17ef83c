"""What stays on the GPU and what is streamed: the plan, the same results under any, the message where nothing fits."""

from dataclasses import replace
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import EXAMPLE, found
import kqprefill
from kqprefill.backends.budget import Budget, host_memory
from kqprefill.backends.cuda.bounds import H100, Speed, estimate, operations
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.kv_cache import DeviceCache, HostCache
from kqprefill.backends.cuda.rehearsal import plan_model
from kqprefill.backends.cuda.weights.plan import CONTEXT_BYTES
from kqprefill.core import SharedKeysValues
from kqprefill.engine.model import open_model
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile

GIB = 1 << 30
HOPPER = kernel_set_of(H100.capability)
WANTED = "gemma3-q4_k_m qwen35-tied-nextn qwen35-q4_k_m qwen3next-moe-q3_k_m gemma4-e2b-q3_k_m gemma4-moe-q4_k_m "
MODELS = [EXAMPLE, *found(WANTED + "deepseek2-moe-glm47-q3_k_m")]


def plan_of(name, budget, tokens, **more):
    return plan_model(read_model(SyntheticFile.named(name)), H100, HOPPER, budget, tokens, **more)


@pytest.mark.parametrize(
    "text,nbytes",
    [
        ("8G", 8 * GIB),
        ("512M", GIB // 2),
        ("1.5GiB", 3 * GIB // 2),
        ("75%", 60 * GIB),
        (4096, 4096),
        (" 2 gb", 2 * GIB),
    ],
)
def test_budgets(text, nbytes):
    assert Budget.parse(text).of(80 * GIB) == nbytes


@pytest.mark.parametrize("text", ["", "8Q", "-1G", "0", "101%", "0%", "G", "1e9", "nan"])
def test_bad_budgets(text):
    with pytest.raises(kqprefill.InputError, match="memory budget"):
        Budget.parse(text)


def test_all_stays_where_it_fits():
    plan = plan_of("qwen3-8b:Q4_K_M", 80 * GIB, 2048)
    assert plan.resident == tuple(range(36)) and not plan.streamed and plan.streamed_bytes == 0
    assert set(plan.parts) == {
        "CUDA context",
        "output",
        "embedding",
        "layers that stay",
        "activations, K, V",
        "allocator's slack",
    }


@pytest.mark.parametrize(
    "name,gib,tokens", [("qwen3-32b:Q4_K_M", 8, 8192), ("llama3-70b:Q4_K_M", 12, 8192), ("qwen3-8b:Q8_0", 6, 40000)]
)
def test_as_many_as_fit_stay_and_are_spread(name, gib, tokens):
    plan = plan_of(name, gib * GIB, tokens)
    layers = sorted(plan.resident + plan.streamed)
    assert layers == list(range(len(layers))) and plan.resident and plan.streamed
    assert plan.nbytes <= gib * GIB < plan.nbytes + 3 * plan.slot_bytes  # not a layer less than there is room for
    gaps, ends = np.diff(plan.resident), (plan.resident[0], len(layers) - 1 - plan.resident[-1])
    assert gaps.max() - gaps.min() <= 1 and all(gaps.min() // 2 - 1 <= end <= gaps.max() // 2 + 1 for end in ends)
    tensors = [t for t in SyntheticFile.named(name).tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    streamed = sum(t.nbytes for t in tensors if int(t.name.split(".")[1]) in plan.streamed)
    assert streamed <= plan.streamed_bytes <= 1.001 * streamed


def test_long_prompts_take_room_from_layers():
    short, long = (plan_of("qwen3-8b:Q4_K_M", 5 * GIB, n) for n in (2048, 30000))
    assert len(long.resident) < len(short.resident)
    assert plan_of("qwen3-8b-yarn:Q4_K_M", int(16e9), 131072).nbytes <= 16e9


def test_caches_are_counted():
    with_cache = plan_of("qwen3-8b:Q4_K_M", 8 * GIB, 2048, cache_bytes=4 * GIB)
    assert with_cache.parts["caches"] == 4 * GIB and with_cache.streamed


@pytest.mark.parametrize("gib,tokens,way_out", [(1, 2048, "a budget of"), (4, 40000, "a shorter prompt")])
def test_too_small_is_one_line_with_a_way_out(gib, tokens, way_out):
    with pytest.raises(kqprefill.BackendError) as error:
        plan_of("qwen3-32b:Q4_K_M", gib * GIB, tokens)
    line = str(error.value)
    assert "\n" not in line and f"{tokens} tokens need at least" in line and way_out in line and f"{gib}.00 GiB" in line
    assert "activations" in line and "--vram" in line


def test_models_that_cuda_does_not_run_are_refused():
    family = read_model(SyntheticFile.named("qwen3-30b-a3b:Q4_K_M"))
    family.experts = replace(family.experts, used=33)
    with pytest.raises(kqprefill.BackendError, match="33 of 128 experts do not run on CUDA"):
        plan_model(family, H100, HOPPER, 80 * GIB, 100)


def test_experts_are_planned_for():
    plan = plan_of("qwen3-30b-a3b:Q4_K_M", 8 * GIB, 4096)
    assert plan.streamed and plan.resident and plan.nbytes <= 8 * GIB
    family = read_model(SyntheticFile.named("qwen3-30b-a3b:Q4_K_M"))
    dense = read_model(SyntheticFile.named("qwen3-8b:Q4_K_M"))
    all_used = operations(plan_of("qwen3-8b:Q4_K_M", 80 * GIB, 4096), dense, 4096)
    assert operations(plan, family, 4096).matrices < all_used.matrices  # 8 of 128 experts are used


def test_the_estimate_knows_which_bound_holds():
    family = read_model(SyntheticFile.named("qwen3-32b:Q4_K_M"))
    speed = Speed(family, H100, HOPPER)
    short, long = (estimate(plan_model(family, H100, HOPPER, 8 * GIB, n), speed) for n in (128, 16384))
    assert short["bus_seconds"] > short["compute_seconds"] and long["bus_seconds"] < long["compute_seconds"]
    assert short["share_of_resident_rate"] < 0.1 and long["share_of_resident_rate"] > 0.95
    everything = estimate(plan_model(family, H100, HOPPER, 80 * GIB, 128), speed)
    assert set(everything) == {"compute_seconds", "tflops"}


def test_host_memory_knows_control_groups(tmp_path):
    everything = host_memory(tmp_path, tmp_path / "none")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert host_memory(tmp_path, tmp_path / "cgroup") == everything > 1 << 20
    (tmp_path / "a" / "memory.max").write_text("1048576\n")
    assert host_memory(tmp_path, tmp_path / "cgroup") == 1 << 20
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    assert host_memory(tmp_path, tmp_path / "cgroup") == 1 << 20


def test_what_is_placed_follows_the_plan_and_survives_failures(monkeypatch):
    from kqprefill.backends.cuda.weights import store

    class Staging:
        failing = False

        def __init__(self, *_):
            pass

        def read_ahead(self, data):
            return True

        def bring(self, pieces):
            if self.failing:
                raise kqprefill.BackendError("the GPU is out of memory")
            return pieces

        def unpack(self, brought):
            pass

        end = close = lambda self: None

    class Buffer:
        def __init__(self, nbytes):
            self.handle, self.size = next(addresses) << 40, nbytes
            held.add(self)

        def close(self, stream):
            held.discard(self)

    addresses, held = itertools.count(1), set()
    monkeypatch.setattr(store, "Staging", Staging)
    stream = SimpleNamespace(sync=lambda: None)
    gpu = SimpleNamespace(allocate=lambda nbytes, what: Buffer(nbytes), stream=stream, index=0)
    family = read_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"))
    everything, little = (plan_model(family, H100, HOPPER, budget, 4000) for budget in (80 * GIB, GIB))
    placed = store.WeightsOnDevice(gpu, None, family)

    def place(plan):
        placed.place(plan, lambda *_: None)

    place(everything)
    assert len(held) == 28 + 1 and not placed.streaming  # layers, and the output that is the embedding too
    place(little)
    assert len(held) == len(little.resident) + 2 and placed.streaming
    Staging.failing = True
    with pytest.raises(kqprefill.BackendError):
        place(everything)
    assert placed.plan is None and len(held) <= len(little.resident) + 1
    Staging.failing = False
    place(everything)
    assert placed.plan is everything and len(held) == 29
    placed.close()
    assert not held


# On a GPU ------------------------------------------------------------------------------------------------------------


def force(monkeypatch, resident):
    """Make every plan one of our choice: small models would always fit."""
    from kqprefill.backends.cuda import backend
    from kqprefill.backends.cuda.device.workspace import aligned
    from kqprefill.backends.cuda.weights.matrix import layer_matrices, tile_bytes

    def plan(family, facts, kernel_set, budget, tokens, cache_bytes=0, ranks=False, share=None, **more):
        everything = plan_model(family, facts, kernel_set, 1 << 60, tokens, cache_bytes, ranks, share, **more)
        own, layers = everything.share.layers, layer_matrices(family)
        streamed = [i for i in own if i not in resident]
        return replace(
            everything,
            resident=tuple(i for i in own if i in resident),
            streamed=tuple(streamed),
            streamed_bytes=1 << 30,
            slot_bytes=max([1 << 20, *(sum(aligned(t.nbytes) for t in layers[i]) for i in streamed)]),
            tile_bytes=max([0, *(tile_bytes(layers[i]) for i in streamed)]),
        )

    monkeypatch.setattr(backend, "plan_model", plan)


@pytest.mark.gpu
def test_packed_batches_are_streamed_too(monkeypatch, rng):
    """One batch after another, each launched before the one before has been read."""
    prompts = [rng.integers(0, 256, n).tolist() for n in rng.integers(1, 200, 60)]
    with kqprefill.load(EXAMPLE, backend="cuda") as model:
        expected = [scored.logprobs for scored in model.score(prompts)]
    force(monkeypatch, [1])
    with kqprefill.load(EXAMPLE, backend="cuda") as model:
        assert model.backend.plan.streamed
        for batch_tokens in (500, 8192, None):
            found = [scored.logprobs for scored in model.score(prompts, batch_tokens)]
            assert all(map(np.array_equal, expected, found))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("n", [5, 700])
def test_streamed_and_resident_give_the_same_bits(monkeypatch, path, kernels, n, rng):
    with kqprefill.load(path, backend="cuda", kernels=kernels) as model:
        assert not model.backend.plan.streamed
        prompts = [rng.integers(0, model.config.vocab_size, n) for _ in range(3)]
        expected = [model.prefill(tokens, logits="all").logits for tokens in prompts]
        count = model.config.block_count
    for resident in ([], [0], [count - 1], list(range(1, count))):
        force(monkeypatch, resident)
        with kqprefill.load(path, backend="cuda", kernels=kernels) as model:
            assert len(model.backend.plan.streamed) == count - len(resident)
            for tokens, logits in zip(prompts, expected):
                assert np.array_equal(model.prefill(tokens, logits="all").logits, logits), f"resident: {resident}"


@pytest.mark.gpu
@pytest.mark.parametrize("lock", [True, False], ids=["locked in place", "through the ring"])
def test_every_way_from_the_host_gives_the_same_weights(monkeypatch, lock, rng):
    """Locked pages, and the ring of staging buffers where locking fails; several layers, formats and windows."""
    from kqprefill.backends.cuda.weights import host_pages

    monkeypatch.setattr(host_pages, "WINDOW", 1 << 20)
    file = SyntheticFile.named("qwen3-0.6b:Q4_K_M")
    tokens = rng.integers(0, 1000, 300)
    with open_model(file, "cuda") as model:
        expected = model.prefill(tokens, logits="last").logits
    if not lock:
        monkeypatch.setattr(host_pages.HostPages, "lock", lambda self, window: False)
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda") as model:
        assert np.array_equal(model.prefill(tokens, logits="last").logits, expected)
    force(monkeypatch, [3, 9])
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda") as model:
        for _ in range(2):
            assert np.array_equal(model.prefill(tokens, logits="last").logits, expected)


@pytest.mark.gpu
def test_experts_are_streamed_too(monkeypatch, rng):
    def load():
        shape = Shape("qwen3moe", 3, 512, 4, 2, 128, 256, 160, 4096, 1e4, experts=16, used=3)
        kinds = {"ffn_gate_inp": GGML.F32, "ffn_down_exps": GGML.Q6_K}
        return open_model(SyntheticFile(shape, lambda name, _: kinds.get(name, GGML.Q4_K), "experts"), "cuda")

    tokens = rng.integers(0, 160, 500)
    with load() as model:
        expected = model.prefill(tokens, logits="all").logits
    force(monkeypatch, [1])
    with load() as model:
        for _ in range(2):
            assert np.array_equal(model.prefill(tokens, logits="all").logits, expected)
        assert model.prefill(tokens, timed=True).stages["streaming"].seconds > 0


@pytest.mark.gpu
def test_a_budget_is_kept(rng):
    tokens = rng.integers(0, 1000, 4000)
    used = []
    for vram in (None, "1.08G"):
        with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", vram=vram, max_tokens=4000) as model:
            token = model.prefill(tokens).token
            plan = model.backend.plan
            assert bool(plan.streamed) == (vram is not None)
            assert model.backend.memory_used() <= plan.nbytes - CONTEXT_BYTES + (8 << 20)
            used.append((model.backend.memory_used(), token))
    assert used[1][0] < used[0][0] and used[0][1] == used[1][1]


@pytest.mark.gpu
def test_a_longer_prompt_than_planned_makes_layers_leave(rng):
    tokens = rng.integers(0, 1000, 6000)
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda") as model:
        expected = [model.prefill(tokens[:n], logits="last").logits for n in (100, 6000)]
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", vram="1.13G", max_tokens=100) as model:
        assert not model.backend.plan.streamed
        for n, logits in ((100, expected[0]), (6000, expected[1]), (100, expected[0])):
            assert np.array_equal(model.prefill(tokens[:n], logits="last").logits, logits)
        assert model.backend.plan.streamed
        with pytest.raises(kqprefill.BackendError, match="40000 tokens need at least"):
            model.prefill(np.zeros(40000, np.int64))
        assert np.array_equal(model.prefill(tokens[:100], logits="last").logits, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_cache_in_host_memory_changes_nothing(monkeypatch, path, streamed, rng):
    if streamed:
        force(monkeypatch, [0])
    with kqprefill.load(path, backend="cuda") as model:
        tokens = rng.integers(0, model.config.vocab_size, 300)
        whole = model.prefill(tokens, logits="all").logits
        cache = model.new_cache(300)
        assert type(cache) is DeviceCache
        monkeypatch.setattr(model.backend, "_budget", 0)
        monkeypatch.setattr(model.backend, "_make_room", lambda *_: None)
        cache = model.new_cache(300)
        assert type(cache) is HostCache
        seen_again = {state.layer for state in model.family.layer_states if isinstance(state, SharedKeysValues)}
        if model.config.block_count > 2 and not seen_again:  # of which two are on the device
            assert cache.device_bytes < DeviceCache.bytes_needed(model.family.layer_states, 300)
        for _ in range(2):
            parts, at = [], 0
            for n in (1, 128, 171):
                parts.append(model.prefill(tokens[at : at + n], logits="all", cache=cache).logits)
                at += n
            assert np.array_equal(np.concatenate(parts), whole)
            cache.reset()
        monkeypatch.setattr("kqprefill.backends.cuda.kv_cache.host_memory", lambda: 1 << 20)
        with pytest.raises(kqprefill.BackendError, match=r"4096 tokens needs .* of host memory"):
            model.new_cache(4096)


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_other_tenants_leave_less_room(rng):
    from kqprefill.backends.cuda.device.gpu import Gpu, check

    tokens = rng.integers(0, 1000, 4000)
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", max_tokens=4000) as model:
        expected = model.prefill(tokens, logits="last").logits
    tenant, held = Gpu(0), []

    def leave(nbytes):
        tenant.stream.sync()
        held.append(check(tenant.driver.cuMemAlloc(tenant.memory()[0] - nbytes)))

    leave(700 << 20)
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", max_tokens=4000) as model:
        assert model.backend.plan.streamed
        assert np.array_equal(model.prefill(tokens, logits="last").logits, expected)
    leave(100 << 20)
    with pytest.raises(kqprefill.BackendError, match=r"tokens need at least .* may be taken"):
        open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", max_tokens=4000)
    for address in held:
        check(tenant.driver.cuMemFree(address))
    tenant.close()


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_an_allocation_that_fails_on_the_way_frees_everything(monkeypatch):
    from kqprefill.backends.cuda.device.gpu import Gpu, check

    gpu = Gpu(0)

    def free():
        gpu.stream.sync()
        return check(gpu.driver.cuMemGetInfo())[0]

    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda"):
        pass
    before, allocate = free(), Gpu.allocate

    def failing(self, nbytes, what):
        failing.left -= 1
        return allocate(self, nbytes if failing.left else 1 << 50, what)

    monkeypatch.setattr(Gpu, "allocate", failing)
    for failing.left in (2, 10, 25):
        with pytest.raises(kqprefill.BackendError, match="out of memory"):
            open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda")
        assert before - free() < 32 << 20
    gpu.close()
