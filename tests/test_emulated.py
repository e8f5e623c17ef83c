"""What the kernels compute, without a GPU: the released models on the host (emulator.py)."""

import numpy as np
import pytest

from conftest import CASES, CONFORMANCE_FOLDERS, EXAMPLE, kl_divergence, relative_error
from emulator import EmulatedModel, why_not
import kqprefill
from kqprefill.backends.base import whole_rows
from kqprefill.core import Batch, Recurrent, Segment
from kqprefill.models.llama4 import Llama4
from test_conformance import limit

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
QUICK = "qwen35-tied-nextn"  # whose programs are compiled soon
RELEASED = sorted(path.stem for path in CONFORMANCE_FOLDERS[0].glob("*.gguf"))
# A case of each kind of layer on Hopper's own kernels, some formats among them.
HOPPER = (
    "llama-q4_k_m gemma3-q4_k_m qwen35-tied-nextn deepseek2-moe-glm47-q3_k_m gemma4-q4_k_m qwen35moe-q4_k_m "
    "nemotron_h_moe-latent llama4-moe-q2_k lfm2moe-q3_k kimi-linear-moe-q2_k qwen3-iq2_xxs qwen3-mxfp4 qwen3-q8_k"
)
WAYS = [(name, "portable") for name in RELEASED] + [(name, "hopper") for name in HOPPER.split()]


def slow_but(quick, cases):
    """Parameters, all of them slow but that one."""
    return [pytest.param(*case, marks=() if case == quick else pytest.mark.slow) for case in cases]


@pytest.fixture
def opened():
    models = []

    def open_(name, kernels="portable", precision="exact"):
        models.append(EmulatedModel(CASES.get(name, name), hopper=kernels == "hopper", precision=precision))
        return models[-1]

    yield open_
    for model in models:
        model.close()


@pytest.mark.parametrize("name,kernels", slow_but((QUICK, "portable"), WAYS))
def test_logits(name, kernels, opened):
    reference = np.load(CASES[name].with_suffix(".npz"))
    logits = opened(name, kernels).run(Batch(reference["tokens"].astype(np.int32))).logits
    divergence = kl_divergence(reference["logits"], logits)
    assert divergence <= limit(name, "cuda"), f"mean KL {divergence:.2e}"


@pytest.mark.parametrize(
    "name,kernels",
    [("tiny-qwen3", kernels) for kernels in ("portable", "hopper")]
    + [pytest.param(name, "hopper", marks=pytest.mark.slow) for name in ("nemotron_h-q2_k", "starcoder2-q3_k")],
)
def test_int8_is_as_far_from_exact_products_as_on_the_cpu(name, kernels, opened, rng):
    path = EXAMPLE if name == "tiny-qwen3" else CASES[name]
    model = opened(path, kernels, "int8")
    tokens = rng.integers(0, model.family.config.vocab_size, 100).astype(np.int32)
    exact, rounded = (kqprefill.load(path, backend="cpu", precision=precision) for precision in ("exact", "int8"))
    with exact, rounded:
        expected = exact.prefill(tokens, logits="all").logits
        limit = kl_divergence(expected, rounded.prefill(tokens, logits="all").logits)
    assert 0.75 * limit < kl_divergence(expected, model.run(Batch(tokens)).logits) < 1.35 * limit


CONTRACT = (
    "qwen35-tied-nextn gemma3-q4_k_m exaone4-swa lfm2-q2_k nemotron_h-q2_k falcon-h1-q2_k hunyuan-dense-q3_k "
    "kimi-linear-moe-q2_k gemma3n-tiny"
)
CUTS = [(name, "portable") for name in CONTRACT.split()] + [("gemma3-q4_k_m", "hopper"), ("nemotron_h-q2_k", "hopper")]
RECURRENT = "qwen35-tied-nextn lfm2-q2_k nemotron_h-q2_k falcon-h1-q2_k kimi-linear-moe-q2_k".split()


INT8 = [(name, kernels, "int8") for name in (QUICK, "qwen35moe-q4_k_m") for kernels in ("portable", "hopper")]


@pytest.mark.parametrize(
    "name,kernels,precision", slow_but((QUICK, "portable", "exact"), [(*case, "exact") for case in CUTS] + INT8)
)
def test_cut_packed_and_cached_are_the_same_bits(name, kernels, precision, opened, rng):
    model = opened(name, kernels, precision)
    tokens = rng.integers(0, model.family.config.vocab_size, 100).astype(np.int32)
    whole = model.run(Batch(tokens)).logits
    cache, at = model.new_cache(110), 0
    for n in (1, 66, 33):
        part = model.run(Batch(tokens[at : at + n], start=at), cache=cache).logits
        assert np.array_equal(part, whole[at : at + n]), f"{n} tokens from {at}"
        at += n
    # Another sequence before it, and two that go on from its first 70 tokens.
    others = rng.integers(0, model.family.config.vocab_size, (2, 20)).astype(np.int32)
    packed = np.concatenate([others[0], tokens[:70], tokens[70:], others[1]])
    segments = (Segment(0, 20), Segment(20, 70), Segment(90, 30, 70, 1), Segment(120, 20, 70, 1))
    logits = model.run(Batch(packed, segments=segments)).logits
    assert np.array_equal(logits[20:120], whole)
    last = model.run(Batch(np.concatenate([tokens[:70], others[1]]))).logits
    assert np.array_equal(logits[120:], last[70:])


SPLIT = "qwen35-tied-nextn gemma3n-tiny gemma4-q4_k_m"


@pytest.mark.parametrize("name", slow_but((QUICK,), [(name,) for name in SPLIT.split() if name in CASES]))
def test_layers_on_two_devices_give_the_same_bits(name, opened, rng):
    """Wherever the model can be parted: the residual stream, or streams, are all that goes across."""
    model = opened(name)
    batch = Batch(rng.integers(0, model.family.config.vocab_size, 70).astype(np.int32))
    whole = model.run(batch).logits
    places = [index for index in range(1, len(model.family.blocks)) if model.family.may_part(index)]
    assert places
    for first in places[:: max(1, len(places) // 2)]:
        assert np.array_equal(model.run_in_shares(batch, first), whole), f"parted at {first}"


@pytest.mark.parametrize("name,kernels", slow_but((QUICK, "portable"), CUTS))
def test_threads_in_another_order_are_the_same_bits(name, kernels, opened, rng, monkeypatch):
    """What no barrier keeps in order would differ: a race."""
    model = opened(name, kernels)
    tokens = rng.integers(0, model.family.config.vocab_size, 140).astype(np.int32)
    by_number = model.run(Batch(tokens)).logits
    for order in range(1, 3):
        monkeypatch.setenv("KQ_EMULATED_ORDER", str(order))
        assert np.array_equal(model.run(Batch(tokens)).logits, by_number), f"order {order}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in RECURRENT])
def test_states_are_those_of_the_cpu(name, opened, rng):
    """Read from a cache, and written to another that goes on."""
    model = opened(name)
    tokens = rng.integers(0, model.family.config.vocab_size, 140).astype(np.int32)
    first, cache, other = tokens[:100], model.new_cache(150), model.new_cache(150)
    model.run(Batch(first), cache=cache)
    model.run(Batch(first[:1]), cache=other)  # which makes the scales
    with kqprefill.load(CASES[name], backend="cpu") as cpu:
        held = cpu.new_cache(150)
        cpu.prefill(first, cache=held)
        own = cpu.backend.state_access(cpu.family, held)
        with model.states(cache) as access, model.states(other) as copy:
            for layer, part in model.family.state_parts():
                if isinstance(part, Recurrent):
                    states = access.recurrence(layer)
                    for got, expected in zip(states, own.recurrence(layer)):
                        assert not got.size or relative_error(expected, got) < 0.02
                    copy.write_recurrence(layer, *states)
                else:
                    copy.write(layer, 0, *whole_rows(access, layer, len(first)))
    other.length = len(first)
    after = Batch(tokens[100:], start=100)
    assert kl_divergence(model.run(after, cache=cache).logits, model.run(after, cache=other).logits) < 1e-4


@pytest.mark.slow
def test_chunks_of_a_sequence(opened, monkeypatch):
    """Those of Llama 4 are of 8192 tokens; here of 128. Always the same: of others one may go to another expert."""
    monkeypatch.setattr(Llama4, "chunk", 128)
    model = opened("llama4-moe-q2_k")
    tokens = np.random.default_rng(1).integers(0, model.family.config.vocab_size, 300).astype(np.int32)
    whole = model.run(Batch(tokens)).logits
    with kqprefill.load(CASES["llama4-moe-q2_k"], backend="cpu") as cpu:
        assert kl_divergence(cpu.prefill(tokens, logits="all").logits, whole) <= 1e-4
    cache, at = model.new_cache(300), 0
    for n in (100, 60, 140):
        part = model.run(Batch(tokens[at : at + n], start=at), cache=cache).logits
        assert np.array_equal(part, whole[at : at + n]), f"{n} tokens from {at}"
        at += n
    packed = np.concatenate([tokens[:200], tokens[200:], tokens[200:260]])
    segments = (Segment(0, 200), Segment(200, 100, 200, 0), Segment(300, 60, 200, 0))
    logits = model.run(Batch(packed, segments=segments)).logits
    assert np.array_equal(logits[:300], whole) and np.array_equal(logits[300:], whole[200:260])
