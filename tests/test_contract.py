"""What a caller of the library relies on (the seed's contract): continuation, edges, determinism, errors."""

import io
import subprocess
import sys

import numpy as np
import pytest

from conftest import BACKENDS, EXAMPLE, found, relative_error
import kqprefill

# Sliding windows of 32 and two rotary bases; recurrent layers, in both of their layouts; experts chosen by sigmoids;
# heads of two sizes, keys and values that layers share, embeddings by layer; latent attention, in both layouts;
# convolutions; Mamba-2 among other layers, and beside attention; chunks of the sequence; Kimi Delta Attention.
NAMES = "gemma3-q4_k_m qwen35-tied-nextn qwen3next-moe-q3_k_m glm4moe-nextn-q3_k_m "
NAMES += "gemma4-q4_k_m gemma4-hd512 gemma4-moe-q4_k_m gemma4-e2b-q3_k_m "
NAMES += "deepseek2-moe-glm47-q3_k_m deepseek2-moe-kv_b-q3_k_m deepseek2-moe-v3-q3_k_m "
NAMES += "lfm2-q2_k lfm2moe-q3_k nemotron_h-q2_k nemotron_h_moe-latent granitehybrid-q2_k falcon-h1-q2_k "
NAMES += (
    "llama4-moe-q2_k cohere2-q2_k hunyuan-moe-q3_k command-r-q3_k starcoder2-q3_k kimi-linear-moe-q2_k gemma3n-tiny"
)
FAMILIES = [EXAMPLE, *found(NAMES)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def model(backend):
    with kqprefill.load(EXAMPLE, backend=backend) as model:
        yield model


@pytest.fixture
def prompt(rng):
    """prompt(model, n): n random tokens."""
    return lambda model, n: rng.integers(0, model.config.vocab_size, n)


@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_cutting_a_prompt_changes_nothing(path, backend, prompt):
    with kqprefill.load(path, backend=backend) as model:
        length = min(300, model.config.context_length)
        tokens = prompt(model, length)
        whole = model.prefill(tokens, logits="all").logits
        cache = model.new_cache(length)
        parts, at = [], 0
        for n in (1, 100, length - 101):
            parts.append(model.prefill(tokens[at : at + n], logits="all", cache=cache).logits)
            at += n
            assert cache.length == at
        cut = np.concatenate(parts)
        if backend == "cuda":
            assert np.array_equal(whole, cut)  # to the bit: sums are ordered by position alone
        else:
            assert relative_error(whole, cut) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_long_and_short_batches_give_the_same_bits(path, kernels, prompt):
    """Batch lengths that different tiles serve, and on both sides of where launches overlap (257 tokens)."""
    with kqprefill.load(path, backend="cuda", kernels=kernels) as model:
        length = min(3300, model.config.context_length)
        tokens = prompt(model, length)
        whole = model.prefill(tokens, logits="all").logits
        cache, at = model.new_cache(length), 0
        for n in (1, 15, 40, 64, length - 120):
            part = model.prefill(tokens[at : at + n], logits="all", cache=cache).logits
            assert np.array_equal(part, whole[at : at + n]), f"{n} tokens from {at}"
            at += n


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_graphs_give_what_launches_give(path, prompt):
    with kqprefill.load(path, backend="cuda") as model:
        prompts = [prompt(model, 100) for _ in range(5)]  # from the third or fourth on, a graph
        got = [model.prefill(tokens, logits="all").logits for tokens in prompts]
        cache = model.new_cache(100)  # with a cache there are no graphs
        for tokens, logits in zip(prompts, got):
            assert np.array_equal(model.prefill(tokens, logits="all", cache=cache).logits, logits)
            cache.reset()
        model.prefill(prompt(model, min(2000, model.config.context_length)))  # work buffers move
        again = [model.prefill(tokens, logits="all").logits for tokens in prompts]
        assert all(np.array_equal(a, b) for a, b in zip(got, again))
        assert relative_error(got[4], got[0]) > 0.01  # another prompt, not the captured one's answer


@pytest.mark.parametrize("n", [1, 7, 129, 300])
def test_last_is_the_last_row_of_all(model, n, prompt):
    tokens = prompt(model, n)
    last, everything, nothing = (model.prefill(tokens, logits=logits) for logits in ("last", "all", None))
    assert last.logits.shape == (model.config.vocab_size,) and everything.logits.shape == (n, model.config.vocab_size)
    assert nothing.logits is None and nothing.token == last.token == everything.token
    assert relative_error(everything.logits[-1], last.logits) < 1e-6
    assert last.prompt_tokens == n and last.timings["prefill"] > 0


def test_a_position_sees_only_what_stands_before_it(model, prompt):
    tokens = prompt(model, 200)
    first = model.prefill(tokens, logits="all").logits
    tokens[150:] = (tokens[150:] + 1) % model.config.vocab_size
    second = model.prefill(tokens, logits="all").logits
    assert relative_error(first[:150], second[:150]) < 1e-6
    assert (np.abs(first[150:] - second[150:]).max(axis=1) > 1e-4).all()


def test_same_prompt_same_bits(model, prompt):
    tokens = prompt(model, 129)
    runs = [model.prefill(tokens, logits="all").logits for _ in range(3)]
    model.prefill(prompt(model, 300))  # other work in between leaves nothing behind
    runs.append(model.prefill(tokens, logits="all").logits)
    assert all(np.array_equal(runs[0], run) for run in runs)


def test_an_empty_prompt_is_a_no_op(model):
    cache = model.new_cache(8)
    result = model.prefill([], logits="all", cache=cache)
    assert result.token is None and result.logits.shape == (0, model.config.vocab_size) and cache.length == 0


@pytest.mark.parametrize(
    "tokens,complaint",
    [
        ([0, 256], "token 256 at position 1"),
        ([-1], "token -1"),
        ([1.5], "integers"),
        ([[1]], "flat sequence"),
        ([0, 10**20], "token 100000000000000000000 at position 1"),
        ([[1], [2, 3]], "flat sequence"),
        (["1"], "integers"),
        ([1, True], "position 1 has True"),
        ([1, np.True_], "position 1 has"),
        ([1, None], "position 1 has None"),
        (np.array([True]), "not bool of shape"),
        ("abc", "not the text 'abc'"),
        ({"a": 1}, "integers, not {'a': 1}"),
        (None, "integers, not None"),
        (5, "integers, not 5"),
        ([10**5000], "an integer of 16610 bits at position 0"),
        ([[[]] * 2] * 70, "position 0 has an array"),
    ],
)
def test_bad_tokens_are_refused(model, tokens, complaint):
    with pytest.raises(kqprefill.InputError, match=complaint):
        model.prefill(tokens)


def test_context_and_cache_room_are_kept(model):
    limit = model.config.context_length
    with pytest.raises(kqprefill.InputError, match=f"context length of {limit}"):
        model.prefill(np.zeros(limit + 1, np.int64))
    with pytest.raises(kqprefill.InputError, match="cache"):
        model.new_cache(limit + 1)
    cache = model.new_cache(10)
    model.prefill([1] * 8, cache=cache)
    with pytest.raises(kqprefill.InputError, match="room for 2 more"):
        model.prefill([1] * 3, cache=cache)
    assert cache.length == 8
    cache.reset()
    assert model.prefill([1] * 8, cache=cache).token == model.prefill([1] * 8).token


@pytest.mark.parametrize("path", found("qwen35-tied-nextn gemma3-q4_k_m"), ids=lambda p: p.stem)
def test_a_prompt_that_fails_leaves_no_wrong_state(path, backend, prompt, monkeypatch):
    """Keys and values are written again; recurrent states cannot be, so their cache must be reset."""
    from kqprefill.engine import model as module

    with kqprefill.load(path, backend=backend) as model:
        tokens, cache = prompt(model, 60), model.new_cache(60)
        whole = model.prefill(tokens, logits="all").logits
        model.prefill(tokens[:20], cache=cache)

        def fail(*_):
            raise kqprefill.BackendError("as if a logit were not finite")

        with monkeypatch.context() as patch:
            patch.setattr(module, "refuse_non_finite", fail)
            with pytest.raises(kqprefill.BackendError, match="as if"):
                model.prefill(tokens[20:40], cache=cache)
        if path.stem.startswith("qwen35"):
            with pytest.raises(kqprefill.InputError, match="recurrent states cannot be taken back: reset it"):
                model.prefill(tokens[20:40], cache=cache)
            with pytest.raises(kqprefill.InputError, match="reset it"):
                model.save_state(io.BytesIO(), cache=cache)
            cache.reset()
            model.prefill(tokens[:20], cache=cache)
        assert relative_error(whole[20:], model.prefill(tokens[20:], "all", cache).logits) < 1e-5


def test_bad_arguments_are_refused(backend):
    with pytest.raises(kqprefill.InputError, match="backend"):
        kqprefill.load(EXAMPLE, backend="tpu")
    with kqprefill.load(EXAMPLE, backend=backend) as model, pytest.raises(kqprefill.InputError, match="logits"):
        model.prefill([1], logits="some")


@pytest.mark.gpu
def test_a_device_that_is_not_there():
    with pytest.raises(kqprefill.BackendError, match="device 99"):
        kqprefill.load(EXAMPLE, backend="cuda", device=99)


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_closing_frees_the_gpu():
    from kqprefill.backends.cuda.device.gpu import Gpu, check

    gpu = Gpu(0)

    def free():
        return check(gpu.driver.cuMemGetInfo())[0]

    def once():
        with kqprefill.load(EXAMPLE, backend="cuda") as model:
            model.prefill([1] * 300, cache=model.new_cache(300))

    once()  # the context's own memory comes with the first use
    before = free()
    for _ in range(3):
        once()
    assert before - free() < 32 << 20
    gpu.close()


def test_a_closed_model_says_so(backend):
    model = kqprefill.load(EXAMPLE, backend=backend)
    model.close()
    model.close()
    for use in (
        lambda: model.prefill([1]),
        lambda: list(model.score([[1, 2]])),
        lambda: model.item([1, 2]),
        lambda: model.tokenize("a"),
        lambda: model.token_text(1),
        lambda: model.new_cache(4),
    ):
        with pytest.raises(kqprefill.InputError, match="has been closed"):
            use()
    model = kqprefill.load(EXAMPLE, backend=backend)
    results = model.score([[1, 2, 3]] * 9, batch_tokens=2)
    next(results)
    model.close()
    with pytest.raises(kqprefill.InputError, match="has been closed"):
        list(results)


def test_a_cache_of_another_model_says_so(model, backend):
    with (
        kqprefill.load(EXAMPLE, backend=backend) as other,
        pytest.raises(kqprefill.InputError, match="cache is not one"),
    ):
        model.prefill([1], cache=other.new_cache(4))


def test_nan_weights_are_an_error_not_a_token(backend, tmp_path):
    raw = bytearray(EXAMPLE.read_bytes())
    from kqprefill.gguf import GGUFFile

    with GGUFFile(EXAMPLE) as file:
        at = file.tensors["blk.1.ffn_down.weight"].offset
        kind = file.tensors["blk.1.ffn_down.weight"].type.name
    at += {"Q4_K": 0, "Q6_K": 208}[kind]
    raw[at : at + 2] = b"\x00\x7e"  # d = NaN
    path = tmp_path / "nan.gguf"
    path.write_bytes(raw)
    with kqprefill.load(path, backend=backend) as model, pytest.raises(kqprefill.BackendError, match="NaN"):
        model.prefill([1, 2, 3])


DAMAGES = {"inf": b"\x00\x7c", "-inf": b"\x00\xfc", "nan": b"\x00\x7e"}


def damaged(path, tensor, row, scale):
    """The example with another scale in the first block of a row of a Q6_K tensor."""
    from kqprefill.gguf import GGUFFile

    raw = bytearray(EXAMPLE.read_bytes())
    with GGUFFile(EXAMPLE) as file:
        found = file.tensors[tensor]
        assert found.type.name == "Q6_K"
        at = found.offset + row * (found.nbytes // found.shape[0]) + 208
    raw[at : at + 2] = DAMAGES[scale]
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("scale", DAMAGES)
@pytest.mark.parametrize("logits", [None, "last", "all"])
def test_logits_that_are_not_finite_are_an_error(backend, logits, scale, tmp_path, capfd):
    """One token's logit, whether the greedy one's or another's."""
    with kqprefill.load(damaged(tmp_path / "model.gguf", "output.weight", 7, scale), backend=backend) as model:
        try:
            result = model.prefill([1, 2, 3], logits=logits)
        except kqprefill.BackendError as error:
            assert "position" in str(error) and ("NaN" in str(error) or "infinities" in str(error))
        else:  # a logit of minus infinity, which nobody asked to see
            assert logits is None and np.isfinite([result.logit, result.logprob]).all()
    assert capfd.readouterr() == ("", "")  # NumPy has no warnings to give


@pytest.mark.parametrize("scale", ["inf", "nan"])
def test_rows_that_are_not_finite_are_named_though_the_last_is(scale):
    from kqprefill.engine.checks import refuse_non_finite

    logits = np.zeros((40, 1 << 19), np.float32)  # some pieces, each looked at by a thread
    refuse_non_finite(logits, 1.0, -1.0, 5, 40)
    logits[:, 3] = 3e38
    logits[:, 4] = 3e38  # a sum that overflows, of logits that do not
    refuse_non_finite(logits, 1.0, -1.0, 5, 40)
    logits[37, 9] = logits[38, 1] = float(scale)
    with pytest.raises(kqprefill.BackendError, match="position 42 hold " + ("NaN" if scale == "nan" else "infinities")):
        refuse_non_finite(logits, 1.0, -1.0, 5, 40)


def test_ties_go_to_the_lowest_id(backend, tmp_path):
    """An output matrix whose rows are all the same gives every token the same logit."""
    from kqprefill.gguf import GGUFFile

    raw = bytearray(EXAMPLE.read_bytes())
    with GGUFFile(EXAMPLE) as file:
        output = file.tensors["output.weight"]
        row = output.nbytes // output.shape[0]
        raw[output.offset : output.offset + output.nbytes] = raw[output.offset : output.offset + row] * output.shape[0]
    path = tmp_path / "tied.gguf"
    path.write_bytes(raw)
    with kqprefill.load(path, backend=backend) as model:
        result = model.prefill([5, 6, 7], logits="last")
        assert len(set(result.logits.tolist())) == 1 and result.token == 0


def test_importing_the_package_is_light():
    code = "import sys, kqprefill; print([m for m in ('numpy', 'cuda', 'rich', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.gpu
def test_tensor_maps_that_are_dropped_change_nothing(monkeypatch, rng):
    """Prompts of more lengths than there is room for tensor maps of, some of them again as CUDA graphs."""
    from kqprefill.backends.cuda.gemm.tensor_maps import TensorMaps

    lengths = [*range(1, 40), 5, 5, 300, 7, 300, 300]
    prompts = {n: rng.integers(0, 256, n) for n in lengths}
    with kqprefill.load(EXAMPLE, backend="cuda") as model:
        expected = {n: model.prefill(prompts[n], logits="all").logits for n in prompts}
    monkeypatch.setattr(TensorMaps, "CAPACITY", 60)
    monkeypatch.setattr(TensorMaps, "A_BATCH", 40)
    with kqprefill.load(EXAMPLE, backend="cuda") as model:
        for n in lengths:
            assert np.array_equal(model.prefill(prompts[n], logits="all").logits, expected[n])
        if model.backend.kernel_set.name == "Hopper":
            assert model.backend.maps.generation > 1
