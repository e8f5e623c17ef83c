"""int8 precision on the CPU: its arithmetic against a plain formula, the same bits in any batch, and what it costs."""

from typing import get_args

import numpy as np
import pytest

from conftest import CASES, EXAMPLE, kl_divergence, relative_error
import kqprefill
from kqprefill.backends import PRECISIONS
from kqprefill.backends.cpu import int8, steady
from kqprefill.backends.cpu.backend import CpuBackend
from kqprefill.backends.cpu.functions import attention_tasks
from kqprefill.backends.cpu.int8 import Rounded, multiply_rounded, rotated
from kqprefill.backends.cpu.ops import CpuOps
from kqprefill.backends.cpu.steady import multiply_by_place, steady_attention_tasks
from kqprefill.core import Batch, no_progress
from kqprefill.engine.model import open_model
from kqprefill.errors import InputError
from kqprefill.gguf import GGUFFile, dequantize
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.models.precision import Precision, takes_int8
from kqprefill.models.weights import Weight
from kqprefill.synthetic import SyntheticFile, SyntheticTensor
from op_models import GPT_OSS, shape
from test_cpu import several_threads  # noqa: F401  # a fixture


def hadamard(n):
    """The orthogonal one, in float64."""
    return np.array([[1.0]]) if n == 1 else np.kron([[1, 1], [1, -1]], hadamard(n // 2)) / np.sqrt(2)


def plainly_rotated(x):
    """As kqprefill.models.precision says it, in float64."""
    groups = -(-x.shape[1] // 128)
    whole = np.zeros((len(x), groups * 128))
    whole[:, : x.shape[1]] = x
    return (whole.reshape(-1, 128) @ hadamard(128)).reshape(len(x), -1)


def plainly_rounded(x):
    turned = plainly_rotated(x)
    scales = np.abs(turned).max(axis=1, keepdims=True) / 127
    return np.rint(turned / scales), scales


def plain_product(a, matrix):
    (x, x_scales), (w, w_scales) = plainly_rounded(a), plainly_rounded(matrix)
    return x @ w.T * x_scales * w_scales.T


def product(a, matrix):
    out = np.full((len(a), len(matrix)), np.nan, np.float32)
    multiply_rounded(Rounded.of(a), Rounded.of(matrix), out)
    return out


# The arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 64, 128, 200, 1024, 1400])
def test_rotation(columns, rng):
    x = rng.standard_normal((37, columns), np.float32)
    assert relative_error(plainly_rotated(x), rotated(x)) < 1e-6


@pytest.mark.parametrize("columns", [80, 128, 640, 2500])
def test_products_are_the_formulas(columns, several_threads, rng, monkeypatch):  # noqa: F811
    monkeypatch.setattr(int8, "_ROTATED_AT_ONCE", 5000)  # in several pieces
    a, matrix = (rng.standard_normal((n, columns), np.float32) for n in (33, 700))
    a *= np.exp(rng.standard_normal((33, 1), np.float32))
    integers, scales = plainly_rounded(a)
    made = Rounded.of(a)
    assert made.integers.dtype == np.int8 and made.integers.min() >= -127
    assert relative_error(scales[:, 0], made.scales) < 1e-6
    near = np.abs(made.integers - integers)  # a half may round otherwise
    assert near.max() <= 1 and near.mean() < 1e-3
    assert (
        relative_error(plain_product(a, matrix), product(a, matrix)) < 1e-3
    )  # where one of them has rounded otherwise
    assert 1e-3 < relative_error(a.astype(np.float64) @ matrix.T.astype(np.float64), product(a, matrix)) < 3e-2


def test_the_sums_are_exact(rng):
    """Also the largest that there are: beyond 2^24, where float32 no longer has every integer."""
    for columns in (128, 1024, 1152, 9216):
        x = rng.integers(-127, 128, (9, columns)).astype(np.int8)
        w = rng.integers(-127, 128, (300, columns)).astype(np.int8)
        x[0], w[0], w[1] = 127, 127, -127
        w[1, 0] = -126
        ones = np.ones(300, np.float32)
        out = np.empty((9, 300), np.float32)
        multiply_rounded(Rounded(x, ones[:9]), Rounded(w, ones), out)
        assert (out == (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32)).all()


def test_a_tokens_result_is_its_own(rng):
    a, matrix = rng.standard_normal((50, 300), np.float32), rng.standard_normal((64, 300), np.float32)
    a[7], a[9] = 0, a[9] * np.float32(1e6)
    whole = product(a, matrix)
    assert all((product(a[i : i + 1], matrix) == whole[i]).all() for i in range(50))
    assert (whole[7] == 0).all()
    broken = a.copy()
    broken[3, 5], broken[4, 5] = np.nan, np.inf
    with np.errstate(all="ignore"):  # as in the engine
        out = product(broken, matrix)
    assert not np.isfinite(out[3:5]).any()  # told by the logits, as in exact arithmetic
    assert (np.delete(out, (3, 4), 0) == np.delete(whole, (3, 4), 0)).all()


def test_tiny_rows_do_not_overflow():
    x = np.full((2, 128), 1e-45, np.float32)
    x[1] = 1e-38
    assert np.isfinite(product(x, np.ones((3, 128), np.float32))).all()


# Which matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,kind,taken",
    [
        ("blk.1.attn_q.weight", GGML.Q4_K, True),
        ("blk.12.ffn_down_exps.weight", GGML.MXFP4, True),
        ("blk.3.ssm_in.weight[ssm_in_z]", GGML.Q4_K, True),
        ("blk.3.ssm_in.weight[attn_qkv]", GGML.Q4_K, True),
        ("blk.3.attn_qkv.weight[attn_q]", GGML.Q4_K, True),
        ("blk.3.ffn_gate_up_exps.weight[ffn_gate_exps]", GGML.Q8_0, True),
        ("blk.3.ffn_up_exps.weight[7]", GGML.Q8_0, True),
        ("blk.10.shortconv.in_proj.weight", GGML.Q4_K, True),
        ("blk.1.attn_k.weight", GGML.Q4_K, True),
        ("blk.3.attn_qkv.weight[attn_v]", GGML.Q4_K, True),
        ("blk.1.attn_kv_a_mqa.weight", GGML.Q4_K, True),
        ("blk.1.attn_q.weight", GGML.F32, False),  # float formats
        ("blk.1.ffn_up.weight", GGML.F16, False),
        ("blk.1.ffn_down_exps.weight[3]", GGML.BF16, False),
        ("blk.0.attn_q.weight", GGML.Q4_K, False),  # the first layer
        ("blk.0.ffn_down_exps.weight[2]", GGML.Q4_K, False),
        ("blk.1.ffn_gate_inp.weight", GGML.Q8_0, False),
        ("blk.1.attn_norm.weight", GGML.F32, False),
        ("blk.1.ssm_alpha.weight", GGML.Q8_0, False),
        ("token_embd.weight", GGML.Q4_K, False),
        ("output.weight", GGML.Q4_K, False),
    ],
)
def test_which_matrices(name, kind, taken):
    assert takes_int8(Weight(SyntheticTensor(name, (256, 256), kind))) == taken


@pytest.mark.parametrize(
    "model,norms",
    [
        ("qwen3-8b:Q4_K_M", {"attn_norm", "ffn_norm"}),
        ("qwen3-30b-a3b:Q4_K_M", {"attn_norm"}),  # the router reads the other
        ("gpt-oss-20b:MXFP4_MOE", {"attn_norm"}),
        ("qwen3-8b:F16", set()),
        ("deepseek-v2-lite:Q4_K_M", set()),
    ],
)
def test_which_norms_are_read_in_int8_alone(model, norms):
    """In all layers but the first, which stays exact."""
    family = read_model(SyntheticFile.named(model))
    heads = {"attn_q_norm", "attn_k_norm"}
    found = {tuple(name.split(".")[1:3]) for name in family.int8_norms}
    assert {pair for pair in found if pair[1] not in heads} == {
        (str(layer), name) for layer in range(1, len(family.blocks)) for name in norms
    }


def linear(weight, a, family, scale=1.0):
    """What the CPU makes of an exact and of an int8 product."""
    batch = Batch(np.zeros(len(a), np.int32))
    every = [CpuOps(family, batch, None, None, precision).linear(a, weight, None, scale) for precision in PRECISIONS]
    return every


def test_weights_of_a_model_are_multiplied_so(rng):
    """Matrices with biases and scales, one expert of many, a part of a matrix; others stay exact."""
    tried = set()
    kinds = (GPT_OSS, GGML.MXFP4), (shape("qwen2", 128, 4, 2, 32, 256, 65, layers=2), GGML.Q5_0)
    for description, kind in (*kinds, (shape("phi3", 256, 4, 4, 64, 256, 65, layers=2), GGML.Q3_K)):
        family = read_model(SyntheticFile(description, lambda *_, kind=kind: kind, "weights"))
        for weight in family.matrices():
            own = weight.expert(1) if len(weight.shape) == 3 else weight
            a = rng.standard_normal((5, own.shape[1]), np.float32)
            exact, found = linear(own, a, family, 1.0 if own.bias else 0.5)
            tried.add((takes_int8(own), own.bias is not None, own.of_stack is not None, "[" in weight.name))
            if not takes_int8(own):
                assert relative_error(exact, found) < 1e-5
                continue
            matrix = dequantize(own.tensor.data, own.tensor.type)
            expected = plain_product(a, matrix) * (1.0 if own.bias else 0.5)
            if own.bias:
                expected += dequantize(own.bias.data, own.bias.type)
            assert relative_error(expected, found) < 3e-3  # a half may round otherwise
            assert relative_error(exact, found) < 0.05
    assert {(True, True, False, False), (True, True, True, False), (True, False, False, True)} <= tried
    assert any(not taken for taken, *_ in tried)


def test_they_are_kept_as_integers():
    tokens = [1, 2, 3]
    with kqprefill.load(EXAMPLE, backend="cpu", precision="int8") as model:
        results = [model.prefill(tokens, logits="all").logits for _ in range(3)]
        matrices = {w.name: w for w in model.family.matrices() if w.name != "token_embd.weight"}
        kept = sum(w.shape[0] * (-(-w.shape[1] // 128) * 128 + 4) for w in matrices.values() if takes_int8(w))
        kept += sum(4 * w.shape[0] * w.shape[1] for w in matrices.values() if not takes_int8(w))
        assert model.backend._weights.nbytes == kept
        assert all((logits == results[0]).all() for logits in results)
    assert model.backend._weights.nbytes == 0


# The same bits -------------------------------------------------------------------------------------------------------

KINDS = (  # of layers, by the beginnings of cases
    "qwen3-q4_k gemma3-q4_k_m gemma4-q4_k_m gemma3n-tiny lfm2moe-q3_k qwen35 falcon-h1-q2_k kimi-linear deepseek2 "
    "llama4-moe-q"
).split()
CUT = sorted(name for name in CASES if name.startswith(tuple(KINDS)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CUT)
def test_the_same_bits_however_a_prompt_is_cut_or_packed(name, precision, rng, monkeypatch):
    """In int8 a last digit that differs makes a value round otherwise, and results differ as much as from exact ones.
    Exact products do it where they are told to."""
    monkeypatch.setenv("KQPREFILL_SAME_BITS", "1" if precision == "exact" else "0")
    with kqprefill.load(CASES[name], backend="cpu", precision=precision) as model:
        ids = np.load(CASES[name].with_suffix(".npz"))["tokens"].tolist()
        whole = model.prefill(ids, logits="all").logits
        cache, pieces, at = model.new_cache(len(ids)), [], 0
        while at < len(ids):
            end = min(len(ids), at + int(rng.integers(1, 41)))
            pieces.append(model.prefill(ids[at:end], logits="all", cache=cache).logits)
            at = end
        assert (np.concatenate(pieces) == whole).all()
        half = len(ids) // 2
        records = [ids, ids[:3], {"tokens": ids[:half], "choices": [ids[half:], ids[half:][::-1]]}, ids[5:]]
        together = list(model.score(records))
        alone = [next(iter(model.score([record]))) for record in records]
        assert all((a.logprobs == b.logprobs).all() for a, b in zip([together[0], *together[2]], [alone[0], *alone[2]]))
        assert (together[2][0].logprobs == together[0].logprobs[half - 1 :]).all()


def test_products_by_place(several_threads, rng, monkeypatch):  # noqa: F811
    a, matrix = rng.standard_normal((150, 70), np.float32), rng.standard_normal((1100, 70), np.float32)
    positions = np.r_[np.arange(90), np.arange(40, 100)]
    monkeypatch.setattr(steady, "_AT_ONCE", 2)
    out = np.full((150, 1200), np.nan, np.float32)[:, 50:1150]
    multiply_by_place(a, matrix, positions, out)
    assert relative_error(a.astype(np.float64) @ matrix.T.astype(np.float64), out) < 1e-6
    for own in (slice(0, 1), slice(3, 40), slice(31, 33), slice(85, 120), slice(0, 150, 32)):
        alone = np.empty((len(positions[own]), 1100), np.float32)
        multiply_by_place(a[own], matrix, positions[own], alone)
        assert (alone == out[own]).all()


@pytest.mark.parametrize("heads,nkv", [(8, 2), (6, 6)])
@pytest.mark.parametrize(
    "more",
    [{}, {"window": 37}, {"window": 40, "chunked": True}, {"both_ways": True}, {"window": 30, "both_ways": True}],
)
def test_attention_by_place(heads, nkv, more, rng):
    q = rng.standard_normal((300, heads, 16), np.float32)
    k, v = rng.standard_normal((300, nkv, 16), np.float32), rng.standard_normal((300, nkv, 24), np.float32)
    sinks = rng.standard_normal(heads, np.float32)

    def attended(way, begin, end, keys, **parts):
        out = np.full((end - begin, heads, 24), np.nan, np.float32)
        options = {"window": None, "softcap": 20.0, "sinks": sinks, **more, **parts}
        for task in way(q[begin:end], k[:keys], v[:keys], out, begin, 0.25, **options):
            task()
        return out

    whole = attended(steady_attention_tasks, 0, 300, 300)
    assert relative_error(attended(attention_tasks, 0, 300, 300, parts=2), whole) < 1e-6
    for begin, end in () if more.get("both_ways") else ((0, 1), (0, 150), (31, 33), (150, 300), (299, 300)):
        assert (attended(steady_attention_tasks, begin, end, end) == whole[begin:end]).all()


# What it costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASES))
def test_conformance(name):
    """At most twice as far from exact arithmetic as llama.cpp is, whose blocks of x have a scale each."""
    reference = np.load(CASES[name].with_suffix(".npz"))
    theirs = float(reference.get("ggml_kld", np.nan))
    if not np.isfinite(theirs):
        pytest.skip("llama.cpp's own divergence is not known")
    with kqprefill.load(CASES[name], backend="cpu", precision="int8") as model:
        logits = model.prefill(reference["tokens"], logits="all").logits
    found = kl_divergence(reference["logits"], logits)
    assert found <= 2 * theirs, f"mean KL {found:.2e}, llama.cpp's {theirs:.2e}"


# The interface -------------------------------------------------------------------------------------------------------


def test_it_is_asked_for_when_a_model_is_opened():
    assert get_args(Precision) == PRECISIONS
    models = [kqprefill.load(EXAMPLE, backend="cpu", **given) for given in ({}, {"precision": "int8"})]
    assert [model.precision for model in models] == ["exact", "int8"]
    assert ", int8 on cpu (" in repr(models[1])
    results = [model.prefill([1, 2, 3], logits="all").logits for model in models]
    assert 0 < kl_divergence(*results) < 1e-3
    with pytest.raises(InputError, match="precision 'int4' is unknown; choose one of exact, int8"):
        kqprefill.load(EXAMPLE, backend="cpu", precision="int4")


def test_a_model_in_float_formats_is_told_to_stay_exact():
    lines, both = [], []
    for precision in PRECISIONS:
        file = SyntheticFile.named("tiny:F16")
        with open_model(file, "cpu", warn=lines.append, precision=precision) as model:
            both.append(model.prefill([1, 2, 3], logits="all").logits)
    assert lines == ["--precision int8 changes nothing: it leaves the first layer and float formats as they are"]
    assert relative_error(*both) < 1e-5


def test_a_backend_takes_it(rng):
    with GGUFFile(EXAMPLE) as file:
        family, backend = read_model(file), CpuBackend()
        backend.load(family, no_progress, precision="int8")
        pending, _ = backend.run(family, Batch(np.array([1, 2, 3], np.int32)), None, "last", no_progress)
        with kqprefill.load(EXAMPLE, backend="cpu", precision="int8") as model:
            assert (pending().logits == model.prefill([1, 2, 3], logits="last").logits).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_a_gpu_rounds_as_the_cpu_does(kernels, rng):
    """It is as far from exact products. Which integers come out differs where halves and floats do, from layer to layer
    more."""
    tokens = rng.integers(0, 256, 100)
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        exact = model.prefill(tokens, logits="all").logits
    with kqprefill.load(EXAMPLE, backend="cpu", precision="int8") as model:
        expected = model.prefill(tokens, logits="all").logits
    with kqprefill.load(EXAMPLE, backend="cuda", kernels=kernels, precision="int8") as model:
        assert model.precision == "int8"
        got = model.prefill(tokens, logits="all").logits
    assert 0.8 < kl_divergence(exact, got) / kl_divergence(exact, expected) < 1.25
