"""The CPU backend: the same bits on any number of threads, what is decoded, and what is kept of it."""

import hashlib
from itertools import pairwise
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT, relative_error
import kqprefill
from kqprefill.backends.budget import free_host_memory, host_memory
from kqprefill.backends.cpu import functions, threads, weights
from kqprefill.backends.cpu.functions import attention_tasks, multiply
from kqprefill.backends.cpu.weights import DecodedWeights
from kqprefill.engine.model import open_model
from kqprefill.gguf import GGUFFile
from kqprefill.synthetic import Shape, SyntheticFile
from kqprefill.synthetic.shapes import recipe_types

# Wide enough that its products are cut into tiles at 400 tokens.
WIDE = Shape("qwen3", 1, 512, 8, 2, 64, 1024, 1000, 4096, 1e6)
HASH = """
import hashlib, sys
sys.path.insert(0, "tests")
from test_cpu import wide_model
with wide_model() as model:
    print(hashlib.sha256(model.prefill([i % 1000 for i in range(400)], logits="all").logits).hexdigest())
"""


def wide_model():
    return open_model(SyntheticFile(WIDE, recipe_types("Q4_K_M", WIDE), "wide"), "cpu")


def test_as_many_threads_as_there_are_give_the_same_bits():
    """BLAS's own threads would each sum in an order that depends on how many they are."""
    found = set()
    for count in ("1", "2", "5"):
        environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        done = subprocess.run([sys.executable, "-c", HASH], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


FORK = """
import os, sys
sys.path.insert(0, "tests")
from test_cpu import wide_model
with wide_model() as model:
    first = model.prefill([1, 2, 3] * 100).logit
    child = os.fork()
    if not child:
        os._exit(model.prefill([1, 2, 3] * 100).logit != first)
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_has_threads_of_its_own():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def several_threads(monkeypatch):
    """Tasks run in threads, though the tests give BLAS one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(threads.blas(), "threads", 3)
        monkeypatch.setattr(threads, "_pool", lambda: pool)
        yield


@pytest.mark.parametrize("bounds", [[0, 1], [0, 40], [0, 1100], [0, 3, 700, 1000]])
def test_products_in_tiles(bounds, several_threads, rng):
    a, matrix = rng.standard_normal((bounds[-1], 384), np.float32), rng.standard_normal((900, 384), np.float32)
    out = np.full((bounds[-1], 1000), np.nan, np.float32)[:, 50:950]
    multiply(a, matrix, bounds, out)
    assert relative_error(a.astype(np.float64) @ matrix.T.astype(np.float64), out) < 1e-6
    for begin, end in pairwise(bounds):  # a segment's bits are its own
        alone = np.empty((end - begin, 900), np.float32)
        multiply(a[begin:end], matrix, [0, end - begin], alone)
        assert (alone == out[begin:end]).all()


@pytest.mark.parametrize("heads,nkv", [(8, 1), (8, 2), (6, 6), (5, 5), (1, 1)])
def test_heads_share_out_to_the_same_bits(heads, nkv, monkeypatch, rng):
    monkeypatch.setattr(functions, "_SCORES_PIECE", heads * 100 * 30)  # several pieces of queries
    q = rng.standard_normal((70, heads, 16), np.float32)
    k, v = rng.standard_normal((2, 100, nkv, 16), np.float32)
    sinks, results = rng.standard_normal(heads, np.float32), []
    for parts in (1, 2, 3, 64):
        out = np.full(q.shape, np.nan, np.float32)
        for task in attention_tasks(q, k, v, out, 30, 0.25, 40, 20.0, sinks, parts):
            task()
        results.append(out)
    assert all(np.isfinite(out).all() and (out == results[0]).all() for out in results)


def test_an_error_in_a_thread_is_heard(several_threads):
    def fail():
        raise ValueError("from a thread")

    with pytest.raises(ValueError, match="from a thread"):
        threads.in_parallel([fail, lambda: None])


def test_blas_has_its_threads_again_after_the_last_batch():
    blas = threads._Blas()
    told = []
    blas.threads, blas._set = 4, told.append
    inside, leave = threading.Event(), threading.Event()

    def other():
        with blas.one_thread():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with blas.one_thread():
        thread.start()
        inside.wait()
    assert 4 not in told  # another batch still runs
    leave.set()
    thread.join()
    assert told[-1] == 4
    with pytest.raises(KeyError), blas.one_thread():
        raise KeyError
    assert told[-1] == 4


class Decoded:
    """Counts what is decoded: (tensor's rows asked for, their elements)."""

    def __init__(self, monkeypatch):
        self.shapes = []
        whole = weights.dequantize

        def dequantize(raw, kind):
            values = whole(raw, kind)
            self.shapes.append(values.shape)
            return values

        monkeypatch.setattr(weights, "dequantize", dequantize)
        monkeypatch.setattr("kqprefill.backends.cpu.ops.dequantize", dequantize)

    def elements(self):
        count = sum(rows * columns for rows, *rest in self.shapes for columns in rest)
        self.shapes.clear()
        return count


def test_matrices_are_kept_from_the_second_batch_on(monkeypatch):
    decoded, tokens = Decoded(monkeypatch), [1, 2, 3]
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        matrices = {w.name: w for w in model.family.matrices()}
        of_layers = sum(w.shape[0] * w.shape[1] for name, w in matrices.items() if name != "token_embd.weight")
        looked_up = len(tokens) * 256
        first = model.prefill(tokens, logits="all").logits
        assert decoded.elements() == of_layers + looked_up and model.backend._weights.nbytes == 0
        again = [model.prefill(tokens, logits="all").logits for _ in range(3)]
        assert decoded.elements() == of_layers + 3 * looked_up  # once more, then no more
        assert model.backend._weights.nbytes == 4 * of_layers
        assert all((logits == first).all() for logits in again)
    assert model.backend._weights.nbytes == 0


def test_no_more_is_kept_than_there_is_room_for(rng):
    with GGUFFile(EXAMPLE) as file:
        tensors = [file.tensors[f"blk.{i}.ffn_gate.weight"] for i in (0, 1)]
        kept = DecodedWeights(room=tensors[0].shape[0] * tensors[0].shape[1] * 4 + 100)
        arrays = [[kept.rows(tensor, 0, 512) for tensor in tensors] for _ in range(3)]
        assert kept.nbytes == arrays[0][0].nbytes
        assert arrays[1][0] is arrays[2][0] and arrays[1][1] is not arrays[2][1]
        assert all((a == b).all() for a, b in zip(arrays[0], arrays[2]))
        kept.close()
        assert kept.nbytes == 0


def test_free_host_memory():
    assert 1 << 20 < free_host_memory() <= host_memory()


def test_a_wide_model_scores_the_same_bits_in_any_batch():
    """Segments of one batch keep the tiles that they have alone."""
    prompts = [[(7 * i + j) % 1000 for i in range(n)] for j, n in enumerate((300, 5, 520, 1, 64))]
    with wide_model() as model:
        together = list(model.score(prompts))
        alone = [next(iter(model.score([prompt]))) for prompt in prompts]
    digests = [[hashlib.sha256(s.logprobs).hexdigest() for s in scored] for scored in (together, alone)]
    assert digests[0] == digests[1]
