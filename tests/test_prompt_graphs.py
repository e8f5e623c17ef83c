"""Prompts whose launches are a graph go on with the ops that were captured: the same bits as prompts that are launched
kernel by kernel, whatever ran between. On emulated kernels, and (gpu) on a device."""

import numpy as np
import pytest

from conftest import CASES
from emulator import why_not
from host_backend import run_on_host
from host_gpu import on_host
from kqprefill.backends.cuda.device import graphs
from kqprefill.backends.cuda.ops.batch import BatchOps
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.core import Batch
from kqprefill.engine.model import open_model
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile

LENGTHS = 7, 30
DENSE = Shape("llama", 2, 160, 4, 2, 40, 200, 131, 4096, 1e4)
emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")


@pytest.fixture
def again(monkeypatch):
    """The batches that captured ops went on with."""
    begun, begin_again = [], BatchOps.begin_again

    def counted(ops, batch):
        begun.append(batch)
        begin_again(ops, batch)

    monkeypatch.setattr(BatchOps, "begin_again", counted)
    return begun


def by_turns(file, rng, begun):
    """Prompts of two lengths by turns, some of them scored, against the same with a cache, in two pieces, without
    graphs: the second piece has other angles."""
    with open_model(file, "cuda") as model:
        vocabulary, cache = model.config.vocab_size, model.new_cache(max(LENGTHS))
        for turn in range(9):
            for length in LENGTHS:
                tokens = rng.integers(0, vocabulary, length)
                got = model.prefill(tokens, logits="all")
                cache.reset()
                before = model.prefill(tokens[:3], logits="all", cache=cache)
                expected = model.prefill(tokens[3:], logits="all", cache=cache)
                assert np.array_equal(got.logits, np.concatenate([before.logits, expected.logits]))
                assert (got.token, got.logit, got.logprob) == (expected.token, expected.logit, expected.logprob)
                last = model.prefill(tokens, logits="last")  # of which other graphs are made
                assert np.array_equal(last.logits, got.logits[-1]) and last.token == got.token
                if turn >= 4:  # a batch of one segment, too, but with targets
                    (scored,) = model.score([tokens])
                    logits = got.logits[:-1].astype(np.float64)
                    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                    wanted = logprobs[np.arange(length - 1), tokens[1:]]
                    np.testing.assert_allclose(scored.logprobs, wanted, atol=1e-4)
    for scored in (False, True):
        assert {len(b.tokens) + scored for b in begun if (b.targets is not None) == scored} == set(LENGTHS)


SHORT = pytest.mark.parametrize("short", [2048, 10], ids=["short", "one is long"])


@emulated
@SHORT
def test_emulated(monkeypatch, rng, again, short):
    """A prompt that is not short is captured after it was launched."""
    run_on_host(monkeypatch)
    monkeypatch.setattr(graphs, "SHORT", short)
    by_turns(SyntheticFile(DENSE, lambda *_: GGML.Q8_0, "dense"), rng, again)


@emulated
def test_what_follows_from_tokens_is_uploaded_again(monkeypatch, rng):
    """Also the rows of a table that stays in the file."""
    run_on_host(monkeypatch)
    with open_model(GGUFFile(CASES["gemma3n-tiny"]), "cuda") as model:
        first, second = (Batch(rng.integers(0, model.config.vocab_size, 9).astype(np.int32)) for _ in range(2))
        ops = CudaOps(model.backend.context, model.family, first, None)
        there = ops.tokens.address, ops._table_rows.address
        ops.begin_again(second)
        rows = model.backend.weights.host_rows(model.family.row_table(), second.tokens)
        assert np.array_equal(on_host(ops.tokens), second.tokens) and np.array_equal(on_host(ops._table_rows), rows)
        assert (ops.tokens.address, ops._table_rows.address) == there


@pytest.mark.gpu
@SHORT
@pytest.mark.parametrize("case", ["qwen3-q4_k", "qwen3next-moe-q3_k_m", "lfm2-q2_k", "gemma3n-tiny"])
def test_on_a_device(case, rng, again, short, monkeypatch):
    monkeypatch.setattr(graphs, "SHORT", short)
    by_turns(GGUFFile(CASES[case]), rng, again)
