"""kqprefill serve through its real entry point: many clients at once, those that go, limits, keys, and how it ends."""

import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import http.client
import json
from pathlib import Path
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.engine.scoring import Item
from test_cli import ENTRY

pytest.importorskip("starlette", reason="needs pip install 'kqprefill[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'kqprefill[serve]'")

LEAST = 1e-6
VOCABULARY = 256


class Served:
    """A server that runs. port: where."""

    def __init__(self, process, port):
        self.process, self.port = process, port

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method, path, body=None, key=None, connection=None):
        """(status, headers, what the body's JSON says, or its text)."""
        connection = connection or self.connect()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        return response.status, response.headers, json.loads(text) if text.startswith(("{", "[")) else text

    def metric(self, name, key=None):
        return float(re.search(rf"^kqprefill_{name} (.*)$", self.ask("GET", "/metrics", key=key)[2], re.MULTILINE)[1])

    def end(self, number=signal.SIGTERM):
        """(exit status, what it said on stdout and stderr)."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


@contextmanager
def served(*options):
    process = subprocess.Popen(
        [*ENTRY, "serve", str(EXAMPLE), "--backend", "cpu", "--port", "0", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stderr.readline()
        assert "is served at http://127.0.0.1:" in said, said + process.stderr.read()
        yield Served(process, int(re.search(r":(\d+) ", said)[1]))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


# What one client asks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with served("--pooling", "mean") as found:
        yield found


def completion(server, **fields):
    status, _, answer = server.ask("POST", "/v1/completions", {"max_tokens": 0, "temperature": 0} | fields)
    assert status == 200, answer
    return answer["choices"]


def test_a_prompts_log_probabilities(server, model):
    """For a text, for ids, and for several, each token's and the likeliest."""
    ids = model.tokenize("Hello world")
    scored = next(iter(model.score([ids], top=3)))
    for prompt in ("Hello world", ids, ["Hello world"], [ids]):
        (choice,) = completion(server, prompt=prompt, echo=True, logprobs=3)
        logprobs = choice["logprobs"]
        assert choice["text"] == "Hello world" and len(logprobs["tokens"]) == len(ids)
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert np.allclose(logprobs["token_logprobs"][1:], scored.logprobs, rtol=0, atol=1e-6)
        for likeliest, values in zip(logprobs["top_logprobs"][1:], scored.top_logprobs):
            assert np.isclose(max(likeliest.values()), values[0], rtol=0, atol=1e-6)
        assert logprobs["text_offset"] == list(range(len(ids)))  # a byte a token


def test_the_greedy_token(server, model):
    prompt = [72, 101, 108, 108, 111]
    expected = model.prefill(prompt)
    for echo in (False, True):
        (choice,) = completion(
            server, prompt=prompt, max_tokens=1, logprobs=1, echo=echo, return_tokens_as_token_ids=True
        )
        assert choice["logprobs"]["tokens"][-1] == f"token_id:{expected.token}"
        assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(expected.logprob, abs=1e-5)


def test_vectors(server, model):
    texts = ["one", "and another"]
    for written in ("float", "base64"):
        fields = {"input": texts, "encoding_format": written}
        status, _, answer = server.ask("POST", "/v1/embeddings", fields)
        assert status == 200, answer
        for given, vector in zip(answer["data"], model.embed(texts, "mean"), strict=True):
            own = given["embedding"]
            own = np.frombuffer(base64.b64decode(own), "<f4") if written == "base64" else own
            assert np.allclose(own, vector, rtol=0, atol=1e-5)


def test_what_tools_ask(server, model):
    text = "a text"
    status, _, answer = server.ask("POST", "/tokenize", {"prompt": text})
    assert (status, answer["tokens"]) == (200, model.tokenize(text))
    assert server.ask("POST", "/detokenize", {"tokens": answer["tokens"]})[2]["prompt"] == text
    assert server.ask("GET", "/v1/models")[2]["data"][0]["id"] == "tiny-qwen3"
    assert server.ask("GET", "/health")[::2] == (200, {"status": "ok"})
    assert "eos_token" in server.ask("GET", "/tokenizer_info")[2]
    completion(server, prompt=[1, 2, 3], echo=True, logprobs=0)
    assert 'kqprefill_requests_total{endpoint="/v1/completions",status="200"}' in server.ask("GET", "/metrics")[2]


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
def test_a_bad_request_is_told_why(server, fields, words):
    status, _, answer = server.ask("POST", "/v1/completions", fields)
    assert status == 400 and words in answer["error"]["message"], answer
    assert str(EXAMPLE.parent) not in answer["error"]["message"]


# Many clients --------------------------------------------------------------------------------------------------------

MALFORMED = [b"{", b"[]", b'{"prompt": [999], "max_tokens": 0}', b'{"prompt": "a", "max_tokens": 9}', b"\xff\xfe"]


def one_request(rng):
    """(kind, path, body) of a request as many send it: 5% are malformed, 5% are given up."""
    kind = rng.choice(["whole", "next", "vectors", "malformed", "gone"], p=[0.5, 0.2, 0.2, 0.05, 0.05])
    prompts = [rng.integers(0, VOCABULARY, n).tolist() for n in rng.integers(2, 120, rng.integers(1, 5))]
    if kind == "malformed":
        return kind, "/v1/completions", MALFORMED[rng.integers(len(MALFORMED))]
    if kind == "vectors":
        return kind, "/v1/embeddings", {"input": prompts}
    asked = {"prompt": prompts, "logprobs": int(rng.integers(0, 4)), "echo": kind != "next"}
    return kind, "/v1/completions", asked | {"max_tokens": int(kind == "next")}


def client(server, requests):
    """Send requests one after another on a connection that is kept, and give what came: (status, body)."""
    connection, answers = server.connect(), []
    for kind, path, body in requests:
        if kind == "gone":
            leaving = server.connect()
            leaving.request("POST", path, json.dumps(body))
            leaving.close()
            answers.append(None)
        else:
            status, _, found = server.ask("POST", path, body, connection=connection)
            answers.append((status, found))
    connection.close()
    return answers


def check(model, kind, asked, answer):
    """Hold an answer against what the model gives by itself."""
    if kind == "gone":
        return
    status, found = answer
    if kind == "malformed":
        assert status == 400 and set(found["error"]) == {"message", "type", "param", "code"}
        return
    assert status == 200, found
    if kind == "vectors":
        vectors = [one["embedding"] for one in found["data"]]
        assert np.allclose(vectors, list(model.embed(asked["input"], "last")), rtol=0, atol=LEAST)
        return
    assert [choice["index"] for choice in found["choices"]] == list(range(len(asked["prompt"])))
    for choice, ids in zip(found["choices"], asked["prompt"]):
        logprobs = choice["logprobs"]
        if kind == "whole":
            expected = next(model.score([ids]))
            assert np.allclose(logprobs["token_logprobs"][1:], expected.logprobs, rtol=0, atol=LEAST)
            assert logprobs["tokens"] == [model.token_text(token) for token in ids]
        else:
            (greedy,) = next(model.score([Item(ids, [[0]], True)], top=1))
            assert choice["text"] == model.token_text(int(greedy.top_tokens[0, 0]))
            assert logprobs["token_logprobs"] == pytest.approx([float(greedy.top_logprobs[0, 0])], abs=LEAST)


def resident_bytes(process):
    """The memory that a process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


def test_fifty_clients_at_once(model, rng):
    """Nothing is wrong, lost or mixed, and memory does not grow."""
    rounds, held = [[[one_request(rng) for _ in range(4)] for _ in range(50)] for _ in range(3)], []
    with served("--pooling", "last", "--batch-tokens", 2000) as server, ThreadPoolExecutor(50) as clients:
        for requests in rounds:
            answers = list(clients.map(lambda own: client(server, own), requests))
            held.append(resident_bytes(server.process))
            for asked, given in zip(requests, answers):
                assert len(asked) == len(given)
                for (kind, _, body), answer in zip(asked, given):
                    check(model, kind, body, answer)
        deadline = time.monotonic() + 30
        while server.metric("waiting_prompts") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.metric("waiting_tokens") == 0 and server.ask("GET", "/health")[0] == 200
        assert server.end() == (0, "")
    assert held[2] - held[1] < 8 << 20, held  # the first round takes what all need


# Those that go, limits, keys -----------------------------------------------------------------------------------------

LONG = {"prompt": [[7] * 1500] * 8, "max_tokens": 1}  # takes half a second or more


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_client_that_goes_is_not_computed_for_and_a_full_queue_says_when():
    with served("--max-queue-tokens", 10, "--batch-tokens", 100) as server:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(LONG))
        wait_until(lambda: server.metric("waiting_prompts") > 0)
        status, headers, found = server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1})
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "tokens wait" in found["error"]["message"]
        connection.close()
        wait_until(lambda: server.metric("waiting_prompts") == 0)
        assert server.metric("prompts_cancelled_total") > 0
        assert server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1})[0] == 200
        assert server.metric("prompts_total") < 9


def test_limits_of_a_request():
    with served("--max-body", 1, "--max-request-tokens", 100) as server:
        status, _, found = server.ask("POST", "/v1/completions", {"prompt": "a" * (2 << 20), "max_tokens": 0})
        assert status == 413 and "1048576 bytes" in found["error"]["message"]
        status, _, found = server.ask("POST", "/v1/completions", {"prompt": [[1] * 60] * 2, "max_tokens": 0})
        assert status == 413 and "120 tokens" in found["error"]["message"]
        assert server.ask("GET", "/nowhere")[0] == 404 and server.ask("GET", "/v1/completions")[0] == 405
        assert "error" in server.ask("GET", "/nowhere")[2]
        assert server.ask("GET", "/v1/models")[2]["data"][0]["id"] == EXAMPLE.stem
        assert str(EXAMPLE.parent) not in json.dumps(server.ask("POST", "/v1/embeddings", {"input": "a"})[2])


def test_a_key_is_asked_for(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with served("--api-key", f"@{tmp_path / 'key'}") as server:
        for key in (None, "wrong", "é", "secret2"):
            status, headers, found = server.ask("GET", "/v1/models", key=key and key.encode().decode("latin1"))
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
            assert found["error"]["type"] == "authentication_error"
        assert server.ask("GET", "/v1/models", key="secret")[0] == 200
        assert server.ask("GET", "/health")[0] == 200 and server.ask("GET", "/metrics")[0] == 401


# How it ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_what_waits_answered_first(number):
    with served("--batch-tokens", 100) as server:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(LONG))
        wait_until(lambda: server.metric("waiting_prompts") > 0)
        server.process.send_signal(number)
        response = connection.getresponse()
        assert response.status == 200 and len(json.loads(response.read())["choices"]) == 8
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out, err) == (0, "", "")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_signal_that_was_blocked_for_us_is_heard():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with served() as server:
            assert server.end() == (0, "")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_client_that_does_not_read_is_left():
    """Its answer, 6 MB, is larger than what the system keeps for it."""
    asked = {"prompt": [[7] * 1500] * 10, "max_tokens": 0, "echo": True, "logprobs": 20}
    with served("--drain", 1) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps(asked).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.metric("prompts_total") == 10)
        begin = time.monotonic()
        status, said = server.end()
        assert status == 0 and 1 <= time.monotonic() - begin < 20
        assert said == (
            "kqprefill: connections closed at the end: 1; their clients took no answer, or sent no whole request, for "
            "1 s (--drain)\n"
        )
        connection.close()


def test_a_second_signal_ends_it_at_once():
    with served("--batch-tokens", 100) as server:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(LONG | {"prompt": [[7] * 1500] * 200}))
        wait_until(lambda: server.metric("waiting_prompts") > 0)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.end()[0] == 143


def test_wrong_options_are_a_line():
    def said(*options):
        command = [*ENTRY, "serve", str(EXAMPLE), "--backend", "cpu", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        (line,) = done.stderr.splitlines()
        return done.returncode, line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert said("--port", port) == (1, f"kqprefill: --host 127.0.0.1 --port {port}: Address already in use")
    assert said("--port", "0", "--api-key", "") == (2, "kqprefill: --api-key: the key is empty")
    assert said("--port", "0", "--host", "no.such.host.invalid")[0] == 2
