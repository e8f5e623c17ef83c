"""Layers split over several devices: who runs what, and (gpu) the same bits as on one, with one device taken several
times over."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import EXAMPLE, found
import kqprefill
from kqprefill.backends.cuda.bounds import H100, Speed
from kqprefill.backends.cuda.device.gpu import device_count
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.pipeline import split as split_module
from kqprefill.backends.cuda.pipeline.split import Device, Flow, chunk_tokens, split
from kqprefill.backends.cuda.rehearsal import plan_model, planned_batch, rehearse
from kqprefill.backends.cuda.weights.plan import CONTEXT_BYTES
from kqprefill.backends.cuda.weights.share import Share
from kqprefill.backends.devices import SAME_DEVICE, device_numbers
from kqprefill.engine.imatrix import importance_matrix
from kqprefill.engine.model import open_model
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile

GIB = 1 << 30
HOPPER = kernel_set_of(H100.capability)


def family_of(name):
    return read_model(SyntheticFile.named(name))


def shares_of(name, budgets, tokens=4096, ranks=False):
    """The layers of each device, of a model on H100s that may take so many GiB each."""
    family = family_of(name)
    devices = [Device(Speed(family, H100, HOPPER), int(budget * GIB)) for budget in budgets]
    return [share.layers for share in split(devices, tokens, 8192, ranks)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_layer_has_one_device(count):
    layers = shares_of("qwen3-8b:Q4_K_M", [79] * count)
    assert [index for own in layers for index in own] == list(range(36))
    lengths = [len(own) for own in layers]
    assert max(lengths) - min(lengths) <= 1


def test_the_head_counts_where_each_token_has_one():
    """Of Qwen3-8B the logits take as long as 3.2 layers: the device that has them runs fewer."""
    first, second = shares_of("qwen3-8b:Q4_K_M", [79, 79], ranks=True)
    assert (len(first), len(second)) == (20, 16)


def test_layers_go_where_there_is_room():
    """19.8 GB of weights: 8 GiB on one device, 40 on the other. Streaming from the first would take longer."""
    first, second = shares_of("qwen3-32b:Q4_K_M", [8, 40], tokens=256)
    assert len(first) + len(second) == 64 and 16 < len(first) <= 24


def test_layers_that_share_keys_stay_together():
    family = family_of("gemma4-e4b:Q4_K_M")
    cuts = [index for index in range(1, len(family.blocks)) if family.may_part(index)]
    sources = {part.layer for _, part in family.state_parts() if type(part).__name__ == "SharedKeysValues"}
    assert cuts == list(range(1, min(sources) + 1))
    (own, others) = shares_of("gemma4-e4b:Q4_K_M", [79, 79])
    assert others.start in cuts and own.stop == others.start


def test_more_devices_than_layers():
    with pytest.raises(kqprefill.BackendError, match="its 2 layers can be split over at most 2 devices, not 3"):
        shares_of("tiny:Q4_K_M", [79] * 3)


def test_a_share_takes_what_its_layers_take():
    """Together the shares take what one device would, and a context, work arrays and crossings each."""
    family = family_of("qwen3-8b:Q4_K_M")
    whole = plan_model(family, H100, HOPPER, 80 * GIB, 2048)
    parts = [
        plan_model(family, H100, HOPPER, 80 * GIB, 2048, share=Share(layers, 36))
        for layers in (range(20), range(20, 36))
    ]
    assert sum(plan.parts["layers that stay"] for plan in parts) == whole.parts["layers that stay"]
    assert "embedding" in parts[0].parts and "output" not in parts[0].parts
    assert "embedding" not in parts[1].parts and parts[1].parts["output"] == whole.parts["output"]
    assert parts[1].parts["between devices"] == 2 * 2048 * 4096 * 4 and "between devices" not in parts[0].parts
    flops = [rehearse(family, H100, HOPPER, planned_batch(64, False), share=p.share).matrix_flops for p in parts]
    assert sum(flops) == rehearse(family, H100, HOPPER, planned_batch(64, False)).matrix_flops


@pytest.mark.parametrize("devices,tokens", [(2, 1), (2, 1024), (2, 32768), (8, 32768), (2, 10**6)])
def test_chunks_begin_where_recurrences_do(devices, tokens):
    size = chunk_tokens(tokens, devices)
    assert size % 1024 == 0 and 1024 <= size <= 8192
    assert tokens <= 16384 * devices or size > 1024


def test_how_a_pipeline_flows():
    """By hand: pieces of 2 s on one device and 1 s on the other."""
    flow = Flow(3, 100, (2.0, 1.0))
    assert flow.all_seconds == 2 + 2 + 2 + 1 and flow.rate == 300 / 7
    assert flow.bubble == pytest.approx(1 - (6 + 3) / (2 * 7))


@pytest.mark.parametrize("given,numbers", [("0", (0,)), ("1,0", (1, 0)), ("all", None), (3, (3,)), ([2, 0], (2, 0))])
def test_devices(given, numbers):
    assert device_numbers(given) == numbers


@pytest.mark.parametrize(
    "given,complaint",
    [
        ("0,0", "device 0 is named twice"),
        ("", "device '': give numbers"),
        ("0,", "device '': give numbers"),
        ("-1", "device '-1'"),
        ("a", "device 'a'"),
        ([], "no device is named"),
        ("٣", "give numbers"),
    ],
)
def test_devices_that_are_none(given, complaint):
    with pytest.raises(kqprefill.InputError, match=complaint):
        device_numbers(given)


def run_command(*arguments, **environment):
    command = [sys.executable, "-m", "kqprefill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_devices_on_the_command_line():
    done = run_command("run", EXAMPLE, "--tokens", "1", "--device", "0,0")
    assert done.returncode == 2 and "device 0 is named twice; each runs layers of its own" in done.stderr
    done = run_command("run", EXAMPLE, "--tokens", "1", KQPREFILL_DEVICE="x")
    assert done.returncode == 2 and "device 'x': give numbers parted by commas" in done.stderr


def test_a_plan_for_several_devices():
    """Without a GPU, of H100s."""
    asked = ["plan", "llama3-70b:Q4_K_M", "--device", "0,1", "--vram", "24G", "-p", "8192"]
    done = run_command(*asked, "--json")
    plan = json.loads(done.stdout)
    assert [device["number"] for device in plan["devices"]] == [0, 1]
    layers = [device["layers"] for device in plan["devices"]]
    assert layers[0][0] == 0 and layers[0][1] + 1 == layers[1][0] and layers[1][1] == 79
    assert plan["chunk_tokens"] == 1024 and plan["crossing_bytes"] == 8192 * 8192 * 4
    assert 0 < plan["bubble"] < 1 and plan["prompt_tokens_per_second"] > 0
    text = run_command(*asked).stdout
    assert "device 0, layers 0 to" in text and "device 1, layers" in text and "wait for one another" in text


# On a GPU ------------------------------------------------------------------------------------------------------------

NAMES = "gemma3-q4_k_m qwen35-tied-nextn qwen3next-moe-q3_k_m gemma4-hd512 gemma4-moe-q4_k_m gemma4-e2b-q3_k_m "
NAMES += (
    "deepseek2-moe-glm47-q3_k_m lfm2moe-q3_k nemotron_h-q2_k falcon-h1-q2_k llama4-moe-q2_k gemma3n-tiny phi3-q4_k_m"
)
FAMILIES = [EXAMPLE, *found(NAMES)]


@pytest.fixture(autouse=True)
def one_device_several_times(request, monkeypatch):
    """One device may be named several times over, where there is one."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setenv(SAME_DEVICE, "1")


@pytest.fixture
def cut(monkeypatch):
    monkeypatch.setattr(split_module, "LEAST_CHUNK", 64)


def several(count):
    """So many devices: the machine's, or its first one over and over where it has not so many."""
    here = device_count()
    return list(range(count)) if count <= here else [0] * count


def results_of(path, device, rng_seed, **more):
    """Logits, likeliest tokens, log-probabilities and vectors of the same prompts."""
    rng = np.random.default_rng(rng_seed)
    with kqprefill.load(path, backend="cuda", device=device, **more) as model:
        vocab, most = model.config.vocab_size, min(500, model.config.context_length)
        prompt = rng.integers(0, vocab, most)
        every = model.prefill(prompt, "all")
        last = model.prefill(prompt[: most // 2], "last")
        cache, parts, at = model.new_cache(most), [], 0
        for n in (1, 100, 70, most - 171):
            parts.append(model.prefill(prompt[at : at + n], "all", cache).logits)
            at += n
        records = [{"tokens": rng.integers(0, vocab, int(n)).tolist()} for n in rng.integers(2, 200, 30)]
        choices = {"tokens": prompt[:50].tolist(), "choices": [prompt[60:70].tolist(), prompt[80:120].tolist()]}
        scored = list(model.score([*records, choices], batch_tokens=400, top=3))
        flat = [one for s in scored for one in (s if isinstance(s, list) else [s])]
        vectors = list(model.embed([record["tokens"] for record in records], "mean", batch_tokens=300))
        return [
            every.logits,
            np.array([every.token, last.token]),
            last.logits,
            np.concatenate(parts),
            *(array for s in flat for array in (s.logprobs, s.top_tokens, s.top_logprobs)),
            *vectors,
        ]


def assert_same(expected, got):
    assert len(expected) == len(got)
    assert all(map(np.array_equal, expected, got))


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_a_pipeline_gives_the_same_bits(path, cut, rng):
    seed = rng.integers(2**31)
    expected = results_of(path, 0, seed)
    family = read_model(GGUFFile(str(path)))
    most = 1 + sum(family.may_part(index) for index in range(1, len(family.blocks)))
    for count in {2, min(4, most)}:
        if count <= most:
            assert_same(expected, results_of(path, several(count), seed))


@pytest.mark.gpu
@pytest.mark.parametrize("path", [EXAMPLE, *found("gemma3n-tiny")], ids=lambda p: p.stem)
def test_prompts_of_one_length(path, rng):
    """From the second on they are graphs, but where a device between the others looks the embedding's rows up on the
    host, as Gemma 3n has its layers do. The last device's are of the last position alone, but not what it receives."""
    family = read_model(GGUFFile(str(path)))
    prompts = rng.integers(0, family.config.vocab_size, (6, 40))
    logits = []
    for device in (0, several(min(3, len(family.blocks)))):
        with kqprefill.load(path, backend="cuda", device=device) as model:
            logits.append([model.prefill(prompt, "last").logits for prompt in prompts])
    assert_same(*logits)


@pytest.mark.gpu
def test_through_host_memory(cut, monkeypatch, rng):
    expected = results_of(EXAMPLE, 0, 5)
    monkeypatch.setenv("KQPREFILL_PEER", "0")
    assert_same(expected, results_of(EXAMPLE, several(2), 5))


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAMILIES[:4], ids=lambda p: p.stem)
def test_a_pipeline_that_streams(path, cut, monkeypatch):
    from test_residency import force

    expected = results_of(path, 0, 6)
    force(monkeypatch, [0])
    assert_same(expected, results_of(path, several(2), 6))


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAMILIES[:6], ids=lambda p: p.stem)
def test_states_of_a_pipeline(path, cut, rng, tmp_path):
    files = []
    for device in (0, several(2)):
        with kqprefill.load(path, backend="cuda", device=device) as model:
            tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, 200)
            model.save_state(tmp_path / "state", tokens)
            files.append((tmp_path / "state").read_bytes())
            cache, more = model.load_state(tmp_path / "state", 10)
            files.append(model.prefill([*more, 1, 2, 3], "last", cache).logits.tobytes())
    assert files[:2] == files[2:]


@pytest.mark.gpu
def test_sums_of_a_pipeline(rng):
    found_sums = []
    for device in (0, several(2)):
        with kqprefill.load(EXAMPLE, backend="cuda", device=device) as model:
            tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, 512).tolist()
            found_sums.append(importance_matrix(model, tokens, 128, output=True).squares)
    one, others = found_sums
    assert set(one) == set(others)
    assert all(np.array_equal(one[names].sums, others[names].sums) for names in one)


@pytest.mark.gpu
def test_a_device_that_fails_is_told_once(cut, monkeypatch):
    with kqprefill.load(EXAMPLE, backend="cuda", device=several(2)) as model:
        tokens = np.arange(300) % model.config.vocab_size
        expected = model.prefill(tokens, "all").logits
        failing = model.backend._members[1].backend
        advance, left = failing.advance, [2]

        def fails(*given, **named):
            left[0] -= 1
            if not left[0]:
                raise kqprefill.BackendError("out of order")
            return advance(*given, **named)

        monkeypatch.setattr(failing, "advance", fails)
        with pytest.raises(kqprefill.BackendError, match=r"^device \d: out of order$"):
            model.prefill(tokens, "all")
        assert np.array_equal(model.prefill(tokens, "all").logits, expected)
        left[0] = 3
        records, got = [tokens[: 10 + i].tolist() for i in range(20)], []
        with pytest.raises(kqprefill.BackendError, match=r"^device \d: out of order$"):
            for scored in model.score(records, batch_tokens=40):
                got.append(scored.logprob)
        again = [scored.logprob for scored in model.score(records, batch_tokens=40)]
        assert got == again[: len(got)] and len(again) == 20


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_memory_is_as_planned():
    with open_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"), "cuda", several(2), max_tokens=4000) as model:
        model.prefill(np.arange(4000), "last")
        plans = model.backend.plans
        assert [plan.share.layers for plan in plans] == [range(14), range(14, 28)]
        planned = sum(plan.nbytes - CONTEXT_BYTES for plan in plans)
        cache = 4000 * 28 * 2 * 8 * 128 * 2  # of the prompt that was cut
        assert model.backend.memory_used() <= planned + cache
        assert len(model.backend.report) == 2 and "handed on" in model.backend.report[0]


@pytest.mark.gpu
def test_devices_that_are_not_there():
    with pytest.raises(kqprefill.BackendError, match="device 99"):
        kqprefill.load(EXAMPLE, backend="cuda", device=[0, 99])
