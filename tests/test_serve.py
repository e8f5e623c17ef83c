"""kqprefill serve without HTTP: answers in OpenAI's shapes, and the queue."""

import base64
from dataclasses import replace
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.core import Pooling
from kqprefill.engine.model import open_model
from kqprefill.engine.reranking import relevances
from kqprefill.engine.scoring import Item
from kqprefill.errors import BackendError
from kqprefill.gguf.types import GGML
from kqprefill.serve.fields import ApiError, Fields
from kqprefill.serve.metrics import Metrics
from kqprefill.serve.openai import Completion, Detokenize, Embeddings, Rerank, Server, Tokenize, tokenizer_info
from kqprefill.serve.queue import SCORES, Engine, Full, Kind, Work
from kqprefill.synthetic import Shape, SyntheticFile, write_gguf

LEAST = 1e-6  # log-probabilities and vectors may differ by so much; on the CPU packing changes none
VOCABULARY = 256


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def server_of(model, pooling: Pooling | None = "mean", most_tokens=10_000):
    return Server(model, "tiny", 20, most_tokens, pooling)


def answered(server, kind, asked):
    """What an endpoint answers, its engine run in this thread."""
    read = kind(server, Fields(json.dumps(asked).encode()))
    engine, done = Engine(server.model, server.top, None, 10_000), []
    work = Work(read.kind, read.items, lambda: done.append(1))
    if read.items:
        engine.submit(work)
    engine.close()
    engine.run()
    assert work.error is None and len(done) == bool(read.items)
    return read.answer(work.results)


def completion(model, prompt, /, **more):
    asked = {"prompt": prompt, "max_tokens": 0} | more
    return answered(server_of(model), Completion, asked)


# The shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 1])
def test_a_prompts_log_probabilities(model, more, rng):
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (1, 2, 50)]
    found = completion(model, prompts, echo=True, logprobs=3, max_tokens=more, temperature=0, seed=7, model="any")
    assert found["object"] == "text_completion" and found["model"] == "tiny"
    assert found["usage"] == {"prompt_tokens": 53, "completion_tokens": 3 * more, "total_tokens": 53 + 3 * more}
    for index, (choice, ids) in enumerate(zip(found["choices"], prompts)):
        assert choice["index"] == index and choice["finish_reason"] == "length"
        logprobs, length = choice["logprobs"], len(ids) + more
        assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [
            length
        ] * 4
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        expected = next(model.score([ids], top=3))
        given = logprobs["token_logprobs"][1 : len(ids)]
        assert np.allclose(given, expected.logprobs, rtol=0, atol=1e-5 if more else 0)  # a row more on the CPU
        for at, top in enumerate(logprobs["top_logprobs"][1 : len(ids)]):
            assert top[model.token_text(ids[at + 1])] >= given[at] and len(top) <= 4
            assert max(top.values()) == pytest.approx(float(expected.top_logprobs[at, 0]), abs=1e-5)
            # Whether a token is the greedy one shows exactly (lm-evaluation-harness compares with ==), but where two
            # are as likely.
            first, second = expected.top_logprobs[at, :2]
            if first - second > 1e-5:
                assert (given[at] == max(top.values())) == (int(expected.top_tokens[at, 0]) == ids[at + 1])
        if more:
            greedy = model.prefill(ids)
            assert logprobs["tokens"][-1] == model.token_text(greedy.token)
            assert logprobs["token_logprobs"][-1] == pytest.approx(greedy.logprob, abs=1e-5)
            assert max(logprobs["top_logprobs"][-1].values()) == logprobs["token_logprobs"][-1]


def test_the_greedy_token_alone(model):
    choice = completion(model, "Hello", max_tokens=1, logprobs=0)["choices"][0]
    greedy = model.prefill(model.tokenize("Hello"))
    text = model.token_text(greedy.token)
    assert choice["text"] == text and choice["logprobs"]["tokens"] == [text]
    assert choice["logprobs"]["token_logprobs"] == [pytest.approx(greedy.logprob, abs=1e-5)]
    assert completion(model, "Hello", max_tokens=1)["choices"][0] == choice | {"logprobs": None}
    assert completion(model, "Hello", echo=True)["choices"][0]["text"] == "Hello"
    assert completion(model, "Hello")["choices"][0]["text"] == ""


def test_ids_in_place_of_texts(model):
    asked = {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = completion(model, [72, 101], **asked)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:72", "token_id:101"] and "token_id:101" in logprobs["top_logprobs"][1]


def test_places_count_characters(model):
    choice = completion(model, "né!", echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == "né!" and choice["logprobs"]["text_offset"] == [0, 1, 1, 2]


def test_what_the_tokenizer_adds_is_no_part_of_the_text():
    """A vocabulary whose texts begin with a BOS and a space."""
    with open_model(SyntheticFile(SHAPE, lambda *_: GGML.F32, "pieces"), "cpu") as model:
        pieces = ["<s>", "▁a", "b", "▁", "a"]
        model.file.metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*pieces, *(f"<unused{i}>" for i in range(len(pieces), SHAPE.vocab))],
            "tokenizer.ggml.scores": [0.0] * SHAPE.vocab,
            "tokenizer.ggml.token_type": [3, *[1] * (SHAPE.vocab - 1)],
            "tokenizer.ggml.bos_token_id": 0,
        }
        asked = {"prompt": "ab a", "add_special_tokens": False}
        without = answered(server_of(model), Tokenize, asked)["tokens"]
        always = replace(server_of(model), always_bos=True)
        assert answered(always, Tokenize, asked)["tokens"] == [0, *without] == model.tokenize("ab a")
        assert answered(always, Tokenize, {"prompt": "ab a"})["tokens"] == [0, *without]
        choice = completion(model, "ab a", echo=True, logprobs=0)["choices"][0]
        assert choice["text"] == "ab a" and choice["logprobs"]["tokens"] == ["<s>", " a", "b", " a"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
        # A token that is made stands within a text, not at its beginning.
        made = completion(model, "ab", max_tokens=1, logprobs=1)["choices"][0]
        assert made["text"] == made["logprobs"]["tokens"][0]


def test_a_file_without_a_vocabulary(rng):
    with open_model(SyntheticFile(SHAPE, lambda *_: GGML.F32, "bare"), "cpu") as bare:
        bare.file.metadata.pop("tokenizer.ggml.tokens", None)
        choice = completion(bare, [5, 6], echo=True, logprobs=1, max_tokens=1)["choices"][0]
        assert choice["text"] == "" and choice["logprobs"]["tokens"][:2] == ["token_id:5", "token_id:6"]


BAD = [
    ({"prompt": "a"}, "max_tokens", "is missing"),
    ({"prompt": "a", "max_tokens": 2}, "max_tokens", "give 0 or 1"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "give 0 or 1"),
    ({"prompt": "a", "max_tokens": 0.0}, "max_tokens", "give 0 or 1"),
    ({"max_tokens": 0}, "prompt", "is missing"),
    ({"prompt": [], "max_tokens": 0}, "prompt", "not empty"),
    ({"prompt": [1, "a"], "max_tokens": 0}, "prompt", "token ids"),
    ({"prompt": [True], "max_tokens": 0}, "prompt", "token ids"),
    ({"prompt": "a", "max_tokens": 0, "logprobs": 21}, "logprobs", "0 to 20"),
    ({"prompt": "a", "max_tokens": 0, "logprobs": True}, "logprobs", "integer"),
    ({"prompt": "a", "max_tokens": 0, "echo": 1}, "echo", "true or false"),
    ({"prompt": "a", "max_tokens": 0, "stream": True}, "stream", "whole"),
    ({"prompt": "a", "max_tokens": 0, "n": 2}, "n", "one completion"),
    ({"prompt": "a", "max_tokens": 0, "stop": ["x"]}, "stop", "does not have it"),
    ({"prompt": "a", "max_tokens": 1, "temperature": 1}, "temperature", "greedy"),
    ({"prompt": "a", "max_tokens": 0, "promt": 1}, "promt", "no field"),
]


@pytest.mark.parametrize("asked,param,words", BAD, ids=range(len(BAD)))
def test_bad_requests_name_the_field(model, asked, param, words):
    with pytest.raises(ApiError, match=re.escape(words)) as found:
        Completion(server_of(model), Fields(json.dumps(asked).encode()))
    assert found.value.status == 400 and found.value.param == param
    assert found.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000, b"3" * 5000], ids=range(7))
def test_bodies_that_are_no_objects(body):
    with pytest.raises(ApiError, match="the body") as found:
        Fields(body)
    assert found.value.status == 400


def test_prompts_that_the_model_refuses(model):
    for prompt in ("", [[]], [VOCABULARY], [1] * (model.config.context_length + 1), "\ud800"):
        with pytest.raises(kqprefill.KqprefillError):
            completion(model, prompt)
    with pytest.raises(ApiError) as found:
        Completion(server_of(model, most_tokens=3), Fields(b'{"prompt": [[1, 2], [3, 4]], "max_tokens": 0}'))
    assert found.value.status == 413


def test_vectors(model):
    texts = ["Hello", "Two words"]
    expected = list(model.embed(texts, "mean"))
    found = answered(server_of(model), Embeddings, {"input": texts, "model": "x", "encoding_format": "float"})
    assert [one["index"] for one in found["data"]] == [0, 1] and found["usage"]["prompt_tokens"] == 14
    assert np.allclose([one["embedding"] for one in found["data"]], expected, rtol=0, atol=LEAST)
    asked = {"input": model.tokenize("Hello"), "encoding_format": "base64", "embd_normalize": -1}
    (one,) = answered(server_of(model), Embeddings, asked)["data"]
    plain = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    assert np.allclose(plain, next(model.embed(["Hello"], "mean", "none")), rtol=0, atol=LEAST)
    with pytest.raises(kqprefill.InputError, match="does not say how its outputs are pooled"):
        answered(server_of(model, None), Embeddings, {"input": "a"})
    for more in ({"dimensions": 5}, {"embd_normalize": 1}, {"encoding_format": 3}):
        with pytest.raises(ApiError):
            answered(server_of(model), Embeddings, {"input": "a"} | more)


SHAPE = Shape("qwen3", 2, 256, 4, 2, 64, 512, 256, 4096, 1e6)
RERANKER = replace(
    SHAPE, more={"pooling_type": 4, "classifier.output_labels": ["yes", "no"]}, optional=r"cls\.output\.weight"
)


def test_relevances(tmp_path):
    file = SyntheticFile(RERANKER, lambda *_: GGML.F32, "reranker")
    file.metadata["tokenizer.chat_template.rerank"] = "Query: {query}\nDocument: {document}\nAnswer:"
    write_gguf(file, tmp_path / "reranker.gguf")
    documents = ["Paris is in France.", "Bread.", "The capital of France is Paris."]
    with kqprefill.load(tmp_path / "reranker.gguf", backend="cpu") as model:
        expected = relevances(model, "capital", documents)
        order = sorted(range(3), key=lambda i: -expected[i])
        asked = {"query": "capital", "documents": documents, "top_n": 2, "return_documents": True}
        found = answered(server_of(model), Rerank, asked)["results"]
        assert [one["index"] for one in found] == order[:2] and found[0]["document"]["text"] == documents[order[0]]
        assert [one["relevance_score"] for one in found] == pytest.approx([expected[i] for i in order[:2]], abs=LEAST)
        bare = answered(server_of(model), Rerank, {"query": "capital", "texts": documents})
        assert [one["index"] for one in bare] == order and set(bare[0]) == {"index", "score"}
        for wrong in ({"documents": "a"}, {"documents": []}, {"documents": [3]}, {"documents": ["a"], "top_n": 2}):
            with pytest.raises(ApiError):
                answered(server_of(model), Rerank, {"query": "q"} | wrong)


def test_what_tools_ask_for(model):
    server = server_of(model)
    found = answered(server, Tokenize, {"prompt": "Hello", "add_special_tokens": False})
    assert found["tokens"] == model.tokenize("Hello", False) and found["count"] == 5
    assert answered(server, Detokenize, {"tokens": found["tokens"]})["prompt"] == "Hello"
    assert answered(server, Detokenize, {"tokens": []})["prompt"] == ""
    assert answered(replace(server, always_bos=True), Tokenize, {"prompt": "Hello"})["tokens"] == found["tokens"]
    info = tokenizer_info(server)
    assert info["chat_template"] is None
    for name in ("bos", "eos"):  # the text that /tokenize makes the token of
        token = model.file.metadata[f"tokenizer.ggml.{name}_token_id"]
        assert model.tokenize(info[f"{name}_token"], False) == [token]


# The queue -----------------------------------------------------------------------------------------------------------


def test_kinds_share_the_engine_and_every_result_is_its_own(model, rng):
    engine, done = Engine(model, 1, 100, 100_000), []
    kinds = [SCORES, Kind("mean"), Kind("last", "none")]
    works = []
    for _ in range(30):
        items = [Item(rng.integers(0, VOCABULARY, n).tolist()) for n in rng.integers(1, 60, 3)]
        works.append(Work(kinds[rng.integers(3)], items, lambda: done.append(1)))
        engine.submit(works[-1])
    gone = works[::7]
    for work in gone:
        engine.cancel(work)
    engine.close()
    engine.run()
    assert engine.waiting_tokens == engine.waiting_prompts == 0 and engine.cancelled == 3 * len(gone)
    assert len(done) == len(works) - len(gone) and engine.prompts == 3 * len(done)
    for work in works:
        prompts = [item.prompt for item in work.items]
        if work in gone:
            assert work.results == [None] * 3
        elif work.kind == SCORES:
            for one, expected in zip(work.results, model.score(prompts)):
                assert np.allclose(one.logprobs, expected.logprobs, rtol=0, atol=LEAST)
        else:
            expected = list(model.embed(prompts, work.kind.pooling, work.kind.normalise))
            assert np.allclose(work.results, expected, rtol=0, atol=LEAST)
    with pytest.raises(BackendError, match="ending"):
        engine.submit(works[0])


def test_a_full_queue_refuses(model):
    engine = Engine(model, 1, None, 10)
    engine.submit(Work(SCORES, [Item([1] * 50)], lambda: None))  # the first, however long
    with pytest.raises(Full, match="50 tokens wait") as found:
        engine.submit(Work(SCORES, [Item([1])], lambda: None))
    assert 1 <= found.value.seconds <= 60


def test_the_queue_is_bounded_cancelled_and_drained(model):
    """In this thread, so that what waits is known."""

    def work(tokens):
        return Work(SCORES, [model.item([1] * tokens)], lambda: done.append(tokens))

    done, engine = [], Engine(model, 1, None, 10)
    first, other = work(8), work(3)
    engine.submit(first)
    with pytest.raises(Full, match="8 tokens wait already; try again in 1 s"):
        engine.submit(other)
    engine.cancel(first)
    assert (engine.waiting_prompts, engine.waiting_tokens, engine.cancelled) == (0, 0, 1)
    engine.submit(other)
    engine.submit(last := work(7))
    engine.close()
    with pytest.raises(kqprefill.BackendError, match="the server is ending"):
        engine.submit(work(1))
    engine.run()
    assert done == [3, 7] and first.results == [None]
    assert np.allclose(last.results[0].logprobs, next(iter(model.score([[1] * 7]))).logprobs, rtol=0, atol=1e-5)


def test_an_error_fails_what_was_computed_and_nothing_else(model, monkeypatch):
    engine = Engine(model, 1, None, 1000)
    works = [Work(Kind("mean"), [Item([1, 2])], lambda: None), Work(SCORES, [Item([1, 2])], lambda: None)]
    for work in works:
        engine.submit(work)

    def failing(prompts, *_):
        for _ in prompts:
            raise BackendError("out of memory")
        yield

    monkeypatch.setattr(model, "embed", failing)
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.close()
    thread.join(30)
    assert str(works[0].error) == "out of memory" and works[1].error is None and works[1].results[0] is not None
    assert engine.failed is None  # a batch has been computed since


def test_metrics_are_prometheus(model):
    metrics, engine = Metrics(), Engine(model, 1, None, 1000)
    for seconds, status in ((0.02, 200), (70, 200), (1, 400)):
        metrics.count("/v1/completions", status, seconds)
    text = metrics.text(engine)
    assert 'kqprefill_requests_total{endpoint="/v1/completions",status="400"} 1' in text
    assert 'kqprefill_request_seconds_bucket{endpoint="/v1/completions",le="60.0"} 1' in text
    assert 'kqprefill_request_seconds_bucket{endpoint="/v1/completions",le="+Inf"} 2' in text
    line = re.compile(r'# (HELP|TYPE) kqprefill_\w+ .+|kqprefill_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.fullmatch(one) for one in text.splitlines())


def test_a_signal_that_another_thread_is_given_is_heard():
    """The main thread is not woken by it, but looks again soon."""
    engine, heard, in_time = Engine(None, 1, None, 1000), threading.Event(), []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.set())

    def given():
        time.sleep(0.2)  # the main thread waits by then
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        in_time.append(heard.wait(5))
        engine.close()

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        thread = threading.Thread(target=given)
        thread.start()
        engine.run()
        thread.join()
        assert in_time == [True]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR1, before)
