"""`Model.score`: log-probabilities are those of the logits, whatever is packed with what, and the same bits."""

import numpy as np
import pytest

from conftest import BACKENDS, EXAMPLE, found, log_softmax
import kqprefill
from kqprefill.backends.cuda.attention_kernels import PortableAttention
from kqprefill.backends.cuda.ops.attention_layout import attention_layout
from kqprefill.core import Segment
from kqprefill.engine.model import open_model
from kqprefill.engine.packing import packs
from kqprefill.engine.perplexity import perplexity
from kqprefill.engine.scoring import Item, item_of
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import SHAPES, Shape, SyntheticFile
from test_models import variant

# Windows of 32; soft-caps; experts, one of them shared; sinks; recurrences. Those that are not released run where they
# are.
WANTED = "gemma3-q4_k_m gemma2-q4_k qwen2moe-q4_k gpt-oss-mxfp4 granite-q4_k qwen35-tied-nextn qwen3next-moe-q3_k_m"
WANTED += " gemma4-q4_k_m gemma4-e2b-q3_k_m gemma4-moe-q4_k_m"  # heads of two sizes; shared keys and values; experts
WANTED += " deepseek2-moe-glm47-q3_k_m"  # latent attention
WANTED += " lfm2-q2_k nemotron_h_moe-latent falcon-h1-q2_k llama4-moe-q2_k kimi-linear-moe-q2_k gemma3n-tiny"

MODELS = [
    pytest.param((path, *way), marks=[pytest.mark.gpu] if way[0] == "cuda" else [], id=f"{path.stem}-{'-'.join(way)}")
    for path in [EXAMPLE, *found(WANTED)]
    for way in (("cpu", "auto"), ("cuda", "auto"), ("cuda", "portable"))
]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    path, backend, kernels = request.param
    with kqprefill.load(path, backend=backend, kernels=kernels) as model:
        yield model


def records(vocabulary, rng):
    """Of many lengths on both sides of attention's tiles, with choices of one token and of many."""

    def ids(n):
        return rng.integers(0, vocabulary, n).tolist()

    lengths = [5, 1, 130, 33, 300, 2, 64, 65, 129]
    plain = [ids(n) for n in lengths]
    return [
        *plain,
        {"tokens": ids(200), "choices": [ids(n) for n in (1, 40, 3, 150)]},
        {"tokens": ids(128), "choices": [ids(n) for n in (2, 2)]},
        {"tokens": ids(40), "choices": [ids(1) for _ in range(4)]},
        {"tokens": ids(70), "completion": ids(9)},
        {"tokens": ids(70), "choices": [ids(9)]},
        {"tokens": [], "choices": [ids(3), ids(4)]},
    ]


def sequences(record):
    """(ids, how many of them are given) of each."""
    if isinstance(record, list):
        return [(record, 1)]
    prompt = record["tokens"]
    return [(prompt + more, max(1, len(prompt))) for more in record.get("choices") or [record["completion"]]]


def flat(results):
    return [scored for result in results for scored in (result if isinstance(result, list) else [result])]


@pytest.mark.parametrize("bias", ["nan", "inf", "-inf"])
def test_log_probabilities_that_are_not_finite(bias, tmp_path):
    """A record's own, whatever the logit: `finite` says so, and perplexity, which has no use for them, refuses."""
    output = np.zeros(256, np.float32)
    output[9] = float(bias)
    with kqprefill.load(variant(tmp_path / "model.gguf", tensors={"output.bias": output}), backend="cpu") as model:
        (one,) = model.score([[1, 9, 3]], top=256)
        assert not one.finite and np.isnan(one.logprob) | np.isinf(one.logprob)
        if bias == "-inf":  # a token that is never likely spoils no other's
            (other,) = model.score([[1, 2, 3]], top=255)
            assert other.finite and np.isfinite(other.perplexity)
        at = 7 if bias == "-inf" else 5
        with pytest.raises(kqprefill.BackendError, match=f"log-probability of token {at} of the text is not finite"):
            perplexity(model, [1, 2, 3, 4, 5, 6, 7, 9], context=8)


def test_a_perplexity_beyond_floats_is_the_largest(tmp_path):
    output = np.zeros(256, np.float32)
    output[9] = 1e30
    with kqprefill.load(variant(tmp_path / "model.gguf", tensors={"output.bias": output}), backend="cpu") as model:
        measured = perplexity(model, [1, 2, 3, 4, 5, 6, 9, 7], context=8)
    assert measured.value == measured.error == np.finfo(float).max


def test_log_probabilities_are_those_of_the_logits(model, rng):
    wanted = records(model.config.vocab_size, rng)
    found = list(model.score(wanted, top=3))
    assert [isinstance(f, list) for f in found] == ["choices" in w for w in wanted]
    for (ids, given), scored in zip((s for w in wanted for s in sequences(w)), flat(found), strict=True):
        expected = log_softmax(model.prefill(ids, logits="all").logits)[given - 1 : -1]
        own = expected[np.arange(len(expected)), ids[given:]]
        assert scored.n_tokens == len(own) and scored.tokens.tolist() == ids[given:]
        assert np.abs(scored.logprobs - own).max(initial=0) <= 1e-4  # NaN fails
        assert scored.logprob == pytest.approx(own.sum(), abs=1e-4 * max(1, len(own)))
        assert scored.top_tokens.shape == scored.top_logprobs.shape == (len(own), 3)
        likeliest = -np.sort(-expected, axis=1)[:, :3]
        assert np.abs(scored.top_logprobs - likeliest).max(initial=0) <= 1e-4
        named = np.take_along_axis(expected, scored.top_tokens.astype(int), axis=1)
        assert np.abs(named - likeliest).max(initial=0) <= 1e-4


def test_packing_changes_no_bit(model, rng):
    wanted = records(model.config.vocab_size, rng)
    if model.backend.name == "cpu":  # there a prompt that is shared is multiplied by itself
        wanted = [w for w in wanted if isinstance(w, list) or "completion" in w]
    alone = flat(scored for w in wanted for scored in model.score([w], top=2))
    together = flat(model.score(wanted, top=2))
    turned = flat(list(model.score(wanted[::-1], top=2))[::-1])
    small = flat(model.score(wanted, batch_tokens=300, top=2))
    waiting = flat(model.score([x for w in wanted for x in (w, None)], top=2))
    separate = flat(model.score((ids for w in wanted for ids, _ in sequences(w)), top=2))
    for one, whole, *others in zip(alone, separate, together, turned, small, waiting, strict=True):
        for other in others:
            for name in ("logprobs", "top_tokens", "top_logprobs"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
        same_tokens = whole.logprobs[len(whole.logprobs) - one.n_tokens :]  # without the computation that choices share
        if model.backend.name == "cpu":  # BLAS may sum a row's logits in another order where the head takes more rows
            assert np.allclose(one.logprobs, same_tokens, rtol=0, atol=1e-5)
        else:
            assert np.array_equal(one.logprobs, same_tokens)


def test_ties_go_to_the_lowest_token(model):
    scored = next(model.score([[1, 2, 3]], top=model.config.vocab_size))
    for tokens, logprobs in zip(scored.top_tokens, scored.top_logprobs):
        assert sorted(tokens) == list(range(model.config.vocab_size))
        assert (np.diff(logprobs) <= 0).all()
        equal = np.diff(logprobs) == 0
        assert (np.diff(tokens)[equal] > 0).all()


def test_results_come_as_soon_as_they_can():
    """With None among the records, nothing waits for more to come."""
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        asked = []

        def slow():
            for ids in ([1, 2], [3, 4], None, [5, 6]):
                asked.append(ids)
                yield ids

        results = model.score(slow())
        next(results), next(results)
        assert asked == [[1, 2], [3, 4], None]


def test_groups_are_full_and_in_order():
    items = [Item(list(range(n))) for n in (60, 50, 30, 200, 5)] + [
        Item([1] * 50, [[2] * 30, [3] * 30, [4] * 10], True)
    ]
    found = list(packs(items, 100))
    sizes = [[piece.tokens for piece, _ in group] for group in found]
    assert sizes == [[60], [50, 30], [200], [5, 80], [90]]
    assert [last for _, last in found[-1] + found[-2]] == [True, True, False]


def test_continued_segments_have_whole_blocks_of_keys_in_common():
    config = PortableAttention(64, 64, 64, 8, 1)
    segments = Segment(0, 150), Segment(150, 10, 150, 0), Segment(160, 200, 150, 0)
    layout = attention_layout(segments, config)
    assert layout.rows == 150 + 22 + 10 + 22 + 200
    assert layout.copies.tolist() == [[128 + i, to + i] for to in (150, 182) for i in range(22)]
    assert layout.row_of.tolist() == [*range(150), *range(172, 182), *range(204, 404)]
    by_row = {t[0]: t[1:].tolist() for t in layout.tiles}
    assert by_row[0] == [128, 0, 0, 0, 0, 150] and by_row[150] == [10, 150, 172 - 150, 2, 0, 160]
    for q_row, (rows, position, kv_row, *_) in by_row.items():
        for p in range(position, position + rows):  # each token finds its own key
            assert kv_row + p == layout.row_of[q_row + p - position]
    ends = layout.tiles[:, 1] + layout.tiles[:, 2]
    assert (np.diff(ends) <= 0).all()


def characters(text):
    """A tokenizer whose pairs `ab` are one token."""
    return [0, *map(ord, text.replace("ab", "\x01"))]


@pytest.mark.parametrize(
    "record,prompt,continuations",
    [
        ({"prompt": "xy"}, "xy", None),
        ({"prompt": "x", "completion": "yz"}, "x", ["yz"]),
        ({"prompt": "xa", "completion": "bc"}, "x", ["\x01c"]),  # a token spans both: it is scored
        ({"prompt": "xa", "choices": ["bc", "c"]}, "x", ["\x01c", "ac"]),  # all over the same stretch
        ({"prompt": "", "completion": "z"}, "", ["z"]),
    ],
)
def test_where_a_completion_begins(record, prompt, continuations):
    item = item_of(record, None, characters, None)
    assert item.prompt == characters(prompt)
    assert item.continuations == (None if continuations is None else [[ord(c) for c in text] for text in continuations])


@pytest.mark.parametrize(
    "record,why",
    [
        ({}, 'either "tokens" or "prompt"'),
        ({"prompt": 3}, "must be a text"),
        ({"tokens": []}, "empty"),
        ({"prompt": "a", "tokens": [1]}, "either"),
        ({"tokens": [1], "completion": "a"}, "must be token ids"),
        ({"prompt": "a", "choices": []}, "at least one"),
        ({"prompt": "a", "choices": ["b", ""]}, "empty"),
        ({"prompt": "a", "choices": "b"}, "must be a list"),
        ({"tokens": [1, 2.5]}, "integers"),
        ({"tokens": [[1]]}, "integers"),
        ({"tokens": [1, 99999]}, "not in the vocabulary"),
        ({"tokens": [1] * 99999}, "context"),
        ({"tokens": "12"}, "integers"),
        ({"tokens": {"a": 1}}, "integers"),
        ({"tokens": None}, "integers"),
        ({"tokens": [True]}, "integers"),
    ],
)
def test_bad_records_are_one_line(record, why):
    with kqprefill.load(EXAMPLE, backend="cpu") as model, pytest.raises(kqprefill.InputError, match=why) as error:
        list(model.score([record]))
    assert "\n" not in str(error.value)


MISTRAL3 = Shape("mistral3", 2, 256, 4, 2, 64, 512, 256, 4096, 1e6, yarn=8.0)
# What llama-perplexity (of llama-cpp-python 0.3.36, on a CPU) prints for these models in F32, over the text below.
LLAMA_CPP = {
    "windows": (SHAPES["tiny"], {}, 512, 276.7514),
    "YaRN": (MISTRAL3, {}, 4096, 274.3067),
    "queries that grow": (MISTRAL3, {"attention.temperature_scale": 1.5}, 4096, 274.4089),
    "YaRN's multiplier": (
        MISTRAL3,
        {"attention.temperature_scale": 1.5, "rope.scaling.yarn_log_multiplier": 1.0},
        4096,
        274.2426,
    ),
}


SLOW, SLOW_CASES = pytest.mark.slow, ("YaRN", "queries that grow")  # which the multiplier's case has in it


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["windows", "YaRN's multiplier", *(pytest.param(c, marks=SLOW) for c in SLOW_CASES)])
def test_perplexity_equals_llama_cpps(case, backend):
    shape, metadata, context, figure = LLAMA_CPP[case]
    text = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(8192))
    file = SyntheticFile(shape, lambda *_: GGML.F32, case)
    file.metadata.update({f"{shape.architecture}.{key}": value for key, value in metadata.items()})
    with open_model(file, backend) as model:
        found = perplexity(model, model.tokenize(text), context)
    assert found.value == pytest.approx(figure, rel=3e-6 if backend == "cpu" else 1e-4)
    assert found.n_tokens == 8192 // context * (context // 2 - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_prompts_longer_than_any_batch(kernels, rng):
    """A prompt past a batch's tokens, and past the tokens whose sums exist at a time, with choices: the same bits."""
    file = SyntheticFile(Shape("qwen3", 2, 256, 4, 2, 64, 512, 256, 40960, 1e6), lambda *_: GGML.Q4_K, "long")
    with open_model(file, "cuda", kernels=kernels, max_tokens=1000, ranks=True) as model:
        prompt, choices = rng.integers(0, 256, 17000).tolist(), [rng.integers(0, 256, n).tolist() for n in (3, 500, 1)]
        shared, short = model.score([{"tokens": prompt, "choices": choices}, [1, 2, 3]], batch_tokens=20000)
        for choice, scored in zip(choices, shared):
            whole = next(model.score([prompt + choice], batch_tokens=1000))
            assert (
                np.array_equal(whole.logprobs[-len(choice) :], scored.logprobs) and np.isfinite(scored.logprobs).all()
            )
        assert np.array_equal(next(model.score([[1, 2, 3]])).logprobs, short.logprobs)
