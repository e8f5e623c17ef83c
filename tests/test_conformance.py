"""Models quantised by ggml against exact arithmetic: mean KL divergence from llama.cpp on the dequantised weights."""

import numpy as np
import pytest

from conftest import CASES, CONFORMANCE_FOLDERS, PATHS, kl_divergence, log_softmax
import kqprefill
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.dequantize import SUPPORTED
from kqprefill.models import FAMILIES


def is_supported(path):
    """By what the file says of itself: a model that ought to run and is refused must fail its test, not lose it."""
    with GGUFFile(path) as file:
        types = {tensor.type for tensor in file.tensors.values()}
        return file.metadata["general.architecture"] in FAMILIES and types <= SUPPORTED


SUPPORTED_CASES = sorted(name for name, path in CASES.items() if is_supported(path))


def limit(name, backend):
    """llama.cpp's CPU reads GELU from a half-precision table, so the Gemma references are less exact."""
    if backend == "cuda":
        # A near tie between two experts may fall the other way.
        return 1e-4 if "moe" in name or name.startswith("gpt-oss") else 1e-5
    return 1e-6 if name.startswith(("gemma", "starcoder2")) else 1e-10


ELSEWHERE = {  # architectures whose cases lie beside a development tree only: large, or of layers that a case here has
    *"gemma2 smollm3 mistral3 gpt-oss qwen2moe qwen3moe olmoe gemma-embedding".split(),
    *"qwen2 qwen3vl qwen3vlmoe internlm2".split(),
}


def test_every_family_and_format_has_a_case():
    """In what is released, which is under 20 MB."""
    architectures, types = set(), set()
    for path in CONFORMANCE_FOLDERS[0].glob("*.gguf"):
        with GGUFFile(path) as file:
            architectures.add(file.metadata["general.architecture"])
            types |= {tensor.type for tensor in file.tensors.values()}
    assert set(FAMILIES) - ELSEWHERE <= architectures <= set(FAMILIES)
    assert {kind.name for kind in SUPPORTED - types} <= {"BF16"}
    assert sum(path.stat().st_size for path in CONFORMANCE_FOLDERS[0].iterdir()) < 20e6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SUPPORTED_CASES)
def test_logits(name, path):
    backend, kernels = path
    reference = np.load(CASES[name].with_suffix(".npz"))
    with kqprefill.load(CASES[name], backend=backend, kernels=kernels) as model:
        result = model.prefill(reference["tokens"], logits="all")
    expected = reference["logits"]
    assert result.logits.shape == expected.shape and result.logits.dtype == np.float32
    divergence = kl_divergence(expected, result.logits)
    assert divergence <= limit(name, backend), f"mean KL {divergence:.2e}"
    ranked = np.sort(expected, axis=-1)
    clear = ranked[:, -1] - ranked[:, -2] > 0.02
    assert np.array_equal(result.logits.argmax(-1)[clear], expected.argmax(-1)[clear])
    assert result.token == int(result.logits[-1].argmax())
    assert result.logit == result.logits[-1, result.token]
    assert result.logprob == pytest.approx(log_softmax(result.logits[-1])[result.token], abs=1e-5)
