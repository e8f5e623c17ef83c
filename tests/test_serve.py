"""Requests over HTTP: the numbers that the library gives, whoever else asks at the time; and bad ones a line each."""

import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import json
import signal
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@contextmanager
def served(*options):
    """A server of the example on the CPU, as its address."""
    command = [sys.executable, "-m", "kqprefill", "serve", str(EXAMPLE), "--port", "0", "--backend", "cpu", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if "is served at " in line:
                    break
            else:
                raise AssertionError("".join(lines))
            yield line.split("is served at ")[1].split()[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address():
    with served("--pooling", "mean", "--max-body", "1", "--max-request-tokens", "1000") as found:
        yield found


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as opened:
        yield opened


def ask(url, body=None, **headers):
    """The status and the answer, JSON where it is."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=30) as answer:
            status, text = answer.status, answer.read().decode()
    except HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith(("{", "[")) else text


def completion(address, **fields):
    status, answer = ask(address + "/v1/completions", {"max_tokens": 0, "temperature": 0} | fields)
    assert status == 200, answer
    return answer["choices"]


def test_a_prompts_log_probabilities(address, model):
    """For a text, for ids, and for several, each token's and the likeliest."""
    ids = model.tokenize("Hello world")
    scored = next(iter(model.score([ids], top=3)))
    for prompt in ("Hello world", ids, ["Hello world"], [ids]):
        (choice,) = completion(address, prompt=prompt, echo=True, logprobs=3)
        logprobs = choice["logprobs"]
        assert choice["text"] == "Hello world" and len(logprobs["tokens"]) == len(ids)
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert np.allclose(logprobs["token_logprobs"][1:], scored.logprobs, rtol=0, atol=1e-6)
        for likeliest, values in zip(logprobs["top_logprobs"][1:], scored.top_logprobs):
            assert np.isclose(max(likeliest.values()), values[0], rtol=0, atol=1e-6)
        assert logprobs["text_offset"] == list(range(len(ids)))  # a byte a token


def test_the_greedy_token(address, model):
    prompt = [72, 101, 108, 108, 111]
    expected = model.prefill(prompt)
    for echo in (False, True):
        (choice,) = completion(
            address, prompt=prompt, max_tokens=1, logprobs=1, echo=echo, return_tokens_as_token_ids=True
        )
        assert choice["logprobs"]["tokens"][-1] == f"token_id:{expected.token}"
        assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(expected.logprob, abs=1e-5)


def test_many_at_once_are_answered_as_alone(address, rng):
    prompts = [rng.integers(1, 200, int(n)).tolist() for n in rng.integers(1, 60, 40)]

    def logprobs(prompt):
        return completion(address, prompt=prompt, echo=True, logprobs=1)[0]["logprobs"]["token_logprobs"][1:]

    alone = [logprobs(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        for one, other in zip(alone, pool.map(logprobs, prompts)):
            assert np.allclose(one, other, rtol=0, atol=1e-4)
    together = completion(address, prompt=prompts[:10], echo=True, logprobs=1)
    assert [choice["index"] for choice in together] == list(range(10))


def test_vectors(address, model):
    texts = ["one", "and another"]
    for written in ("float", "base64"):
        fields = {"input": texts, "encoding_format": written}
        status, answer = ask(address + "/v1/embeddings", fields)
        expected = list(model.embed(texts, "mean")) if status == 200 else []
        assert status == 200, answer
        for given, vector in zip(answer["data"], expected, strict=True):
            own = given["embedding"]
            own = np.frombuffer(base64.b64decode(own), "<f4") if written == "base64" else own
            assert np.allclose(own, vector, rtol=0, atol=1e-5)


def test_what_tools_ask(address, model):
    text = "a text"
    status, answer = ask(address + "/tokenize", {"prompt": text})
    assert (status, answer["tokens"]) == (200, model.tokenize(text))
    assert ask(address + "/detokenize", {"tokens": answer["tokens"]})[1]["prompt"] == text
    assert ask(address + "/v1/models")[1]["data"][0]["id"] == "tiny-qwen3"
    assert ask(address + "/health") == (200, {"status": "ok"})
    assert "eos_token" in ask(address + "/tokenizer_info")[1]
    completion(address, prompt=[1, 2, 3], echo=True, logprobs=0)
    assert 'kqprefill_requests_total{endpoint="/v1/completions",status="200"}' in ask(address + "/metrics")[1]


@pytest.mark.parametrize(
    "fields,words",
    [
        ({}, '"prompt" is missing'),
        ({"prompt": "a"}, '"max_tokens" is missing'),
        ({"prompt": "a", "max_tokens": 7}, "this server computes prompts: give 0 or 1"),
        ({"prompt": [], "max_tokens": 0}, "not empty"),
        ({"prompt": [1, 10**9], "max_tokens": 0}, "1000000000"),
        ({"prompt": [1, "a"], "max_tokens": 0}, '"prompt" must be'),
        ({"prompt": "a", "max_tokens": 0, "stream": True}, "whole"),
        ({"prompt": "a", "max_tokens": 1, "temperature": 0.7}, "greedy"),
        ({"prompt": "a", "max_tokens": 0, "logprobs": 21}, "0 to 20"),
        ({"prompt": "a", "max_tokens": 0, "nonsense": 1}, "nonsense"),
    ],
)
def test_a_bad_request_is_told_why(address, fields, words):
    status, answer = ask(address + "/v1/completions", fields)
    assert status == 400 and words in answer["error"]["message"], answer
    assert str(EXAMPLE.parent) not in answer["error"]["message"]


def test_limits(address):
    path = address + "/v1/completions"
    assert ask(path, b"{nonsense")[0] == 400
    assert ask(path, b"[" * 100_000)[0] == 400
    assert ask(path, b" " * (2 << 20))[0] == 413
    assert ask(path, {"prompt": [[1] * 60] * 20, "max_tokens": 0, "echo": True, "logprobs": 0})[0] == 413
    assert ask(address + "/v1/nothing")[0] == 404
    assert ask(path)[0] == 405  # GET


def test_the_key_is_asked_for():
    with served("--api-key", "secret") as address:
        body = {"prompt": [1, 2], "max_tokens": 0}
        assert ask(address + "/v1/completions", body)[0] == 401
        assert ask(address + "/v1/completions", body, Authorization="Bearer wrong")[0] == 401
        assert ask(address + "/v1/completions", body, Authorization="Bearer secret")[0] == 200
        assert ask(address + "/health")[0] == 200


def test_the_queue_is_bounded_cancelled_and_drained(model):
    """In this thread, so that what waits is known."""
    from kqprefill.serve.queue import SCORES, Engine, Full, Work

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
