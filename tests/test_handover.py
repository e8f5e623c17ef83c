"""Prompts computed here and decoded by llama.cpp (the wheel xllamacpp), and its states gone on with here."""

from pathlib import Path

import numpy as np
import pytest

from conftest import CASES, ROOT, found, kl_divergence, relative_error
import kqprefill
from kqprefill.engine.handover import state_shape
from kqprefill.errors import InputError, StateError
from kqprefill.states.elements import ELEMENTS
from kqprefill.states.read import StateFile
from test_golden import gemma  # noqa: F401  (a fixture)

STEPS, PROMPT = 32, 80  # tokens decoded, and of a prompt: several windows of the small models
SEQUENCE, SESSION = "ggsq-4", "ggsn-11"  # what the wheel's llama.cpp reads
# Full attention, sliding windows, sinks, latent rows in both layouts, recurrences, keys and values that layers share;
# convolutions alone, Mamba-2, both in one layer, chunks, Kimi Delta Attention.
FAMILIES = (
    "qwen3-q8_0 llama-q4_k_m phi3-q4_k_m gemma2-q4_k gemma3-q4_k_m gpt-oss-mxfp4 deepseek2-moe-glm47-q3_k_m "
    "deepseek2-moe-kv_b-q3_k_m qwen35-tied-nextn qwen35moe-q4_k_m qwen3next-moe-q3_k_m qwen3vl-q4_k_m gemma4-q4_k_m "
    "gemma4-e2b-q3_k_m gemma-q4_k glm4-q4_k_m glm4moe-nextn-q3_k_m granite-q4_k olmo2-q4_k qwen2-q5_k smollm3-q4_k "
    "lfm2-q2_k lfm2moe-q3_k nemotron_h-q2_k nemotron_h_moe-latent granitehybrid-q2_k falcon-h1-q2_k llama4-moe-q2_k "
    "cohere2-q2_k kimi-linear-moe-q2_k hunyuan-moe-q3_k starcoder2-q3_k command-r-q3_k gemma3n-tiny"
)
CASES_HERE = [pytest.param(path, id=path.stem) for path in found(FAMILIES)]


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("xllamacpp", reason="the wheel of llama.cpp is not installed: pip install '.[compare]'")
    import llama_cpp

    return llama_cpp


@pytest.fixture(scope="module")
def in_f32(llama, tmp_path_factory):
    """in_f32(path): the model's file with its weights in F32, made once."""
    folder, made = tmp_path_factory.mktemp("f32"), {}

    def file(path):
        if path not in made:
            made[path] = llama.as_f32(path, folder / path.name)
        return made[path]

    return file


def prompt_of(model, rng, n=PROMPT):
    """A random prompt; of a model with experts always the same one. In one of 40 runs some random prompt had two
    experts that are equal but for float32's last digits, of which llama.cpp and kqprefill choose one each."""
    rng = rng if model.family.experts is None else np.random.default_rng(n)
    return rng.integers(3, model.config.vocab_size, n).tolist()


def decoded(llama, path, state, prompt, session=False, **context):
    """The tokens of llama.cpp's greedy decoding on our state (the first of them given), and the logits of each step:
    its own over the same tokens, and those on our state."""
    length = len(prompt) + STEPS + 2
    with llama.LlamaCpp(path, n_ctx=max(256, length), **context) as ours:
        assert ours.load(state, session=session) == prompt
        if session:  # which has the last token's state not
            ours.decode(prompt[-1:], len(prompt) - 1)
        tokens, steps = [int(prompt[0])], []
        for step in range(STEPS):
            steps.append(ours.decode(tokens[-1:], len(prompt) + step))
            tokens.append(int(steps[-1].argmax()))
    with llama.LlamaCpp(path, n_ctx=max(256, length), **context) as alone:
        alone.decode(prompt, 0)
        own = [alone.decode([token], len(prompt) + step) for step, token in enumerate(tokens[:-1])]
    return tokens[:-1], own, steps


def divergences_of(expected, steps):
    return [kl_divergence(a, b) for a, b in zip(expected, steps)]


@pytest.mark.parametrize("path", CASES_HERE)
def test_llama_cpp_decodes_what_was_computed_here(llama, in_f32, path, rng, tmp_path):
    path = in_f32(path)
    with kqprefill.load(path, backend="cpu") as model:
        prompt = prompt_of(model, rng)
        # Where a token's experts are nearly equal, what f16 rounds would choose others.
        number = "f16" if model.family.experts is None else "f32"
        model.save_state(tmp_path / "state", prompt, keys=number, values=number)
    types = ELEMENTS[number].number
    _, own, steps = decoded(llama, path, tmp_path / "state", prompt, type_k=types, type_v=types)
    divergences, same = divergences_of(own, steps), sum(a.argmax() == b.argmax() for a, b in zip(own, steps))
    print(f"{path.stem}: KL at most {max(divergences):.1e}, {same} of {STEPS} greedy tokens the same")
    assert max(divergences) <= 1e-4, divergences


@pytest.mark.parametrize("path", CASES_HERE)
def test_llama_cpp_writes_the_same_bytes_but_for_rounding(llama, in_f32, path, rng, tmp_path):
    """Of a prompt within every window: all that is not a number of the state is equal, and the numbers nearly so."""
    path = in_f32(path)
    with kqprefill.load(path, backend="cpu") as model:
        prompt, shape = prompt_of(model, rng, 15), state_shape(model.family)
        model.save_state(tmp_path / "ours", prompt, keys="f32", values="f32")
        with llama.LlamaCpp(path, n_ctx=256, type_k=llama.F32, type_v=llama.F32) as other:
            other.decode(prompt, 0)
            other.save(tmp_path / "theirs", prompt)
        with StateFile(tmp_path / "ours", shape) as ours, StateFile(tmp_path / "theirs", shape) as theirs:
            for state in range(len(model.family.layer_states)):
                for read in ("keys_values", "recurrence"):
                    known = ours._attention if read == "keys_values" else ours._recurrent
                    for a, b in zip(*(getattr(f, read)(state) for f in (ours, theirs))) if state in known else ():
                        assert a is b is None or a.size == b.size == 0 or relative_error(b, a) < 1e-2
        assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
        if "kv_b" not in path.stem:
            cache, rest = model.load_state(tmp_path / "theirs", room=1)
            assert rest == []
            got = model.prefill([prompt[0]], logits="last", cache=cache).logits
            assert kl_divergence(model.prefill([*prompt, prompt[0]], logits="last").logits, got) <= 1e-3


OPTIONS = {
    "f32": ({"keys": "f32", "values": "f32"}, {"type_k": 0, "type_v": 0}),
    "q8_0": ({"keys": "q8_0", "values": "q8_0"}, {"type_k": 8, "type_v": 8}),
    "q8_0 keys": ({"keys": "q8_0", "values": "f16"}, {"type_k": 8}),
    "transposed": ({"transposed": True}, {"flash": False}),
    "streams": ({"streams": 3}, {"n_seq_max": 3}),
    "few cells": ({"cells": 34}, {}),
    "all cells": ({"cells": 4096}, {"swa_full": True}),
    "session": ({"format": SESSION}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "path", [p for p in CASES_HERE if p.id in ("qwen3-q8_0", "gemma3-q4_k_m", "qwen35-tied-nextn")]
)
def test_the_decoder_s_options(llama, in_f32, path, name, rng, tmp_path):
    path, (options, context) = in_f32(path), OPTIONS[name]
    with kqprefill.load(path, backend="cpu") as model:
        prompt = prompt_of(model, rng)
        model.save_state(tmp_path / "state", prompt, **options)
    context = {**context, "n_ctx": 768} if name == "streams" else context
    if name == "streams":
        with llama.LlamaCpp(path, **context) as ours:
            assert ours.load(tmp_path / "state") == prompt
            ours.decode(prompt[:1], len(prompt))
        return
    _, own, steps = decoded(llama, path, tmp_path / "state", prompt, name == "session", **context)
    assert max(divergences_of(own, steps)) <= 1e-3, divergences_of(own, steps)


def test_llama_cpp_refuses_what_it_was_not_told(llama, rng, tmp_path):
    """The versions and forms matter: a test of the tests above."""
    path = CASES["qwen3-q8_0"]
    with kqprefill.load(path, backend="cpu") as model:
        prompt = prompt_of(model, rng)
        for options in ({"format": "ggsq-3"}, {"keys": "f32"}, {"transposed": True}, {"streams": 2}):
            model.save_state(tmp_path / "state", prompt, **options)
            with llama.LlamaCpp(path) as other, pytest.raises(AssertionError):
                other.load(tmp_path / "state")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["F32", "Q4_K_M"])
def test_gemma3_270m(llama, in_f32, gemma, weights, tmp_path, capsys):  # noqa: F811
    """The real model, 600 tokens of text: more than its window of 512.

    With quantised weights llama.cpp's products round activations to 8 bits, in a prefill of its own and in decoding:
    then what it decodes on our state is as near to exact logits as what it decodes after its own prefill.
    """
    path = in_f32(Path(gemma)) if weights == "F32" else gemma
    with kqprefill.load(path, backend="cpu") as model:
        prompt = model.tokenize((ROOT / "LICENSE").read_text())[:600]
        cache = model.new_cache(600 + STEPS)
        assert model.save_state(tmp_path / "state", prompt, cache).prompt_tokens == 600
        tokens, own, steps = decoded(llama, path, tmp_path / "state", prompt)
        exact = model.prefill(tokens, logits="all", cache=cache).logits
    handed, alone, between = (divergences_of(*pair) for pair in ((exact, steps), (exact, own), (own, steps)))
    same = sum(a.argmax() == b.argmax() for a, b in zip(own, steps))
    with capsys.disabled():
        print(
            f"\nGemma 3 270M in {weights}: {same} of {STEPS} greedy tokens are llama.cpp's own; KL, mean and largest:"
        )
        for what, kl in (("exact to handed over", handed), ("exact to its own", alone), ("its own to that", between)):
            print(f"  {what}: {np.mean(kl):.1e} {max(kl):.1e}")
    if weights == "F32":
        assert max(between) <= 1e-3 and max(handed) <= 1e-3
    else:
        assert np.mean(handed) <= max(1e-2, 1.5 * np.mean(alone)) and np.mean(between) <= 1e-2


# Without llama.cpp ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "qwen3-q8_0 gemma3-q4_k_m deepseek2-moe-glm47-q3_k_m qwen35-tied-nextn".split())
def test_a_state_goes_on_here(name, rng, tmp_path):
    with kqprefill.load(CASES[name], backend="cpu") as model:
        prompt = prompt_of(model, rng)
        exact = model.prefill(prompt, logits="last").logits
        model.save_state(tmp_path / "half", prompt[:50], keys="f32", values="f32")
        cache, rest = model.load_state(tmp_path / "half", room=30)
        assert rest == [] and cache.tokens == prompt[:50]
        got = model.save_state(tmp_path / "whole", prompt[50:], cache, logits="last", keys="f32", values="f32")
        assert got.prompt_tokens == 30 and relative_error(exact, got.logits) < 1e-5
        cache, _ = model.load_state(tmp_path / "whole", room=1)
        assert cache.tokens == prompt
        after = model.prefill(prompt[:1], logits="last", cache=cache).logits
        assert relative_error(model.prefill([*prompt, prompt[0]], logits="last").logits, after) < 1e-5


@pytest.mark.parametrize("name", ["qwen3-q8_0", "qwen35-tied-nextn"])
@pytest.mark.parametrize("options", [{"format": SESSION}, {"hold_back": True}])
def test_the_last_token_is_left_to_the_decoder(name, options, rng, tmp_path):
    with kqprefill.load(CASES[name], backend="cpu") as model:
        prompt = prompt_of(model, rng)
        exact = model.prefill(prompt, logits="last").logits
        got = model.save_state(tmp_path / "state", prompt, logits="last", keys="f32", values="f32", **options)
        assert got.prompt_tokens == PROMPT and relative_error(exact, got.logits) < 1e-5
        cache, rest = model.load_state(tmp_path / "state", room=1)
        assert cache.tokens == prompt[:-1] and rest == (prompt[-1:] if "format" in options else [])
        assert relative_error(exact, model.prefill(prompt[-1:], logits="last", cache=cache).logits) < 1e-5


def test_what_cannot_be_saved(rng, tmp_path):
    with kqprefill.load(CASES["qwen35-tied-nextn"], backend="cpu") as model:
        for tokens, options, message in (
            ([], {}, "no tokens whose state"),
            ([5], {"hold_back": True}, "two tokens at least"),
            ([5], {"format": "ggsq-9"}, "'ggsq-9' is unknown"),
            ([5], {"values": "q8_0", "transposed": True}, "cannot be transposed"),
        ):
            with pytest.raises(InputError, match=message):
                model.save_state(tmp_path / "state", tokens, **options)
        cache = model.new_cache(8)
        model.prefill([5, 6], cache=cache)
        with pytest.raises(InputError, match="cannot go back"):
            model.save_state(tmp_path / "state", [], cache, format=SESSION)
        with pytest.raises(kqprefill.KqprefillError, match="cannot be written"):
            model.save_state(tmp_path / "no" / "folder", [5])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", "qwen3-q8_0 gemma3-q4_k_m qwen35-tied-nextn deepseek2-moe-glm47-q3_k_m".split())
def test_a_file_that_is_cut_short_or_another_model_s(name, rng, tmp_path):
    with kqprefill.load(CASES[name], backend="cpu") as model:
        model.save_state(tmp_path / "state", prompt_of(model, rng))
        whole = (tmp_path / "state").read_bytes()
        held = list(model._caches)
        for length in (0, 3, 11, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(StateError, match=r"^\S+cut: [^\n]+$"):
                model.load_state(tmp_path / "cut")
        assert model._caches == held
    with kqprefill.load(CASES["gemma4-q4_k_m"], backend="cpu") as other:
        with pytest.raises(StateError, match=r"^\S+state: [^\n]+$"):
            other.load_state(tmp_path / "state")
        assert not other._caches


def test_a_damaged_file_is_refused_or_read(rng, tmp_path):
    with kqprefill.load(CASES["gemma3-q4_k_m"], backend="cpu") as model:
        model.save_state(tmp_path / "state", prompt_of(model, rng, 12))
        whole = np.frombuffer((tmp_path / "state").read_bytes(), np.uint8)
        for _ in range(200):
            damaged = whole.copy()
            places = rng.integers(0, min(len(whole), 800), rng.integers(1, 4))
            damaged[places] = rng.integers(0, 256, len(places))
            (tmp_path / "damaged").write_bytes(damaged.tobytes())
            try:
                model.drop_cache(model.load_state(tmp_path / "damaged")[0])
            except StateError as error:
                assert "\n" not in str(error)
