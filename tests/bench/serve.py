"""`kqprefill serve` under load: many clients, each answer checked; latencies, and the rate beside Model.score's.

python tests/bench/serve.py [MODEL] [--clients 200] [--seconds 60] [--backend auto] [--option=--vram=8G …]

MODEL: a file, or a SHAPE:RECIPE (qwen3-8b:Q4_K_M). 600 prompts of 50 to 2000 tokens are scored in process first, which
gives the rate and the figures that answers are held against. Then each client sends one after another of them, or of
what is malformed (5%), or goes before it is answered (5%). The clients are threads of several processes: of one alone
Python would run no two at a time. Exit status 1 where an answer is wrong or missing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
import http.client
import json
import multiprocessing
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
from threading import Lock, Thread
import time
from typing import Any

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.core import Float32Array
from kqprefill.engine.model import open_model
from kqprefill.engine.scoring import Item

COUNT = 600
_PATIENCE = 60  # seconds for an answer
_TO_END = 20  # seconds for the server, after SIGTERM
TOLERANCE = {"cuda": 1e-6, "cpu": 1e-4}  # on the CPU a row more or less of a prompt is another order of sums
MALFORMED = [b"{", b'{"prompt": [-1], "max_tokens": 0}', b'{"prompt": "a", "max_tokens": 9}', b"\xff"]
PORT = re.compile(r" is served at http://[^ ]*:(\d+) ")


@dataclass
class Expected:
    """What answers are held against: each prompt, and the log-probabilities of its tokens but the first."""

    prompts: list[list[int]]
    logprobs: list[Float32Array]
    rate: float
    tolerance: float


@dataclass
class Outcome:
    """What clients have met. last: when the last answer came, as time.monotonic says."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    last: float = 0.0

    def add(self, other: Outcome) -> None:
        """Take what others have met, too."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.kinds += other.kinds
        self.wrong += other.wrong
        self.last = max(self.last, other.last)


def expected_of(name: str, backend: str, longest: int) -> Expected:
    """Score the prompts in this process, twice: kernels are compiled the first time."""
    rng = np.random.default_rng(0)
    with open_model(open_file(name), backend, ranks=True) as model:
        most = min(longest, model.config.context_length - 1)
        lengths = rng.integers(min(50, most), most + 1, COUNT)
        prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in lengths]
        list(model.score([Item([*ids, 0]) for ids in prompts[:60]], top=20))
        begin = time.perf_counter()
        scored = list(model.score([Item([*ids, 0]) for ids in prompts], top=20))
        rate = sum(map(len, prompts)) / (time.perf_counter() - begin)
        where = f"{model.backend.name} ({model.backend.device_name})"
        print(f"{name}, {where}: Model.score {rate:.0f} tokens/s", flush=True)
        return Expected(prompts, [one.logprobs[:-1] for one in scored], rate, TOLERANCE[model.backend.name])


def clients(port: int, expected: Expected, seeds: list[int], end: float) -> Outcome:
    """What a client for each seed has met, all of them threads of this process."""
    outcome, lock = Outcome(), Lock()
    with ThreadPoolExecutor(len(seeds)) as pool:
        for one in [pool.submit(client, port, expected, outcome, lock, seed, end) for seed in seeds]:
            one.result()
    return outcome


def client(port: int, expected: Expected, outcome: Outcome, lock: Lock, seed: int, end: float) -> None:
    """Send requests one after another until `end` (time.monotonic); what comes of them is noted, under the lock."""
    choose = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    while time.monotonic() < end:
        kind = choose.choices(("asked", "malformed", "gone"), (90, 5, 5))[0]
        index, more = choose.randrange(COUNT), choose.randrange(2)
        asked = {"prompt": expected.prompts[index], "max_tokens": more, "echo": True, "logprobs": 1}
        body = choose.choice(MALFORMED) if kind == "malformed" else json.dumps(asked).encode()
        begin = time.perf_counter()
        try:
            if kind == "gone":
                leaving = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
                leaving.request("POST", "/v1/completions", body)
                time.sleep(choose.random() / 5)
                leaving.close()
                complaint = ""
            else:
                connection.request("POST", "/v1/completions", body)
                response = connection.getresponse()
                complaint = checked(kind, response.status, response.read(), expected, index, more)
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            complaint = f"{kind}: {type(error).__name__}: {error}"
        took = time.perf_counter() - begin
        with lock:
            outcome.last = time.monotonic()
            outcome.kinds[kind] += 1
            if complaint:
                outcome.wrong.append(complaint)
            elif kind == "asked":
                outcome.seconds.append(took)
                outcome.tokens += len(expected.prompts[index])


def checked(kind: str, status: int, body: bytes, expected: Expected, index: int, more: int) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if kind == "malformed":
        return "" if status == 400 else f"a malformed request was answered with {status}"
    if status != 200:
        return f"{status}: {body[:200]!r}"
    logprobs: list[Any] = json.loads(body)["choices"][0]["logprobs"]["token_logprobs"]
    own = expected.logprobs[index]
    if len(logprobs) != len(own) + 1 + more or logprobs[0] is not None:
        return f"{len(logprobs)} log-probabilities of {len(own) + 1} tokens"
    off = float(np.abs(np.array(logprobs[1 : len(own) + 1]) - own).max(initial=0))
    return "" if off <= expected.tolerance else f"log-probabilities are off by {off:.3g}"


def resident_mib(process: subprocess.Popen[str]) -> float:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> int:
    """Do what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen3-8b:Q4_K_M")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--longest", type=int, default=2000)
    parser.add_argument("--option", action="append", default=[], help="of kqprefill serve, as --option=--vram=8G")
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    given = parser.parse_args()
    processes = min(given.processes, given.clients)
    expected = expected_of(given.model, given.backend, given.longest)
    command = [sys.executable, "-m", "kqprefill", "serve", given.model, "--port", "0", "--backend", given.backend]
    begin, more = time.monotonic(), {"PYTHONFAULTHANDLER": "1"}
    # Whoever has started this may have it ignored or blocked, which holds in the processes that it starts, too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    server = subprocess.Popen([*command, *given.option], stderr=subprocess.PIPE, text=True, env={**os.environ, **more})
    assert server.stderr is not None
    said: list[str] = []
    while (found := PORT.search(line := server.stderr.readline())) is None:
        said.append(line)
        if not line:
            print("the server has ended:", *said, sep="\n")
            return 1
    hearing = Thread(target=said.extend, args=(server.stderr,), daemon=True)  # a pipe that is full would stop it
    hearing.start()
    port, outcome = int(found[1]), Outcome()
    print(f"the server listens after {time.monotonic() - begin:.1f} s", flush=True)
    seeds = [list(range(first, given.clients, processes)) for first in range(processes)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        begin = time.monotonic()
        warmed = begin + min(5.0, given.seconds / 4)
        warm = [pool.submit(clients, port, expected, [-1 - number], warmed) for number in range(processes)]
        wrong = [complaint for one in warm for complaint in one.result().wrong]
        print(f"the clients' processes have started after {time.monotonic() - begin:.1f} s", flush=True)
        held, begin = [resident_mib(server)], time.monotonic()
        waiting = [pool.submit(clients, port, expected, own, begin + given.seconds) for own in seeds]
        for _ in range(4):
            time.sleep(given.seconds / 4)
            held.append(resident_mib(server))
        for one in waiting:
            outcome.add(one.result())
    rate = outcome.tokens / (outcome.last - begin)
    p50, p99 = np.percentile(outcome.seconds, (50, 99)) if outcome.seconds else (np.nan, np.nan)
    print(f"{given.clients} clients, {given.seconds:.0f} s: {dict(outcome.kinds)}, {len(outcome.wrong)} wrong")
    print(f"p50 {p50:.3f} s, p99 {p99:.3f} s; {rate:.0f} tokens/s, {rate / expected.rate:.3f} of Model.score's")
    print(f"memory of the server, MiB: {', '.join(f'{own:.0f}' for own in held)}", flush=True)
    server.send_signal(signal.SIGTERM)
    try:
        status = server.wait(_TO_END)
    except subprocess.TimeoutExpired:
        wrong.append(f"the server has not ended {_TO_END} s after SIGTERM; its signals, and where its threads are:")
        wrong.append(" ".join(re.findall(r"(?:Sig|Shd)\w+:\s\w+", Path(f"/proc/{server.pid}/status").read_text())))
        server.send_signal(signal.SIGABRT)  # which has it say where its threads are
        status = server.wait()
    hearing.join()
    print(f"exit status of the server: {status}")
    for complaint in (*outcome.wrong[:10], *wrong[:10], *map(str.rstrip, said)):
        print(complaint)
    return int(bool(outcome.wrong or wrong or status))


if __name__ == "__main__":
    sys.exit(main())
