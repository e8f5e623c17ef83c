"""Shared test data and helpers. Tests marked `gpu` are skipped, visibly, where no NVIDIA GPU can be used."""

from pathlib import Path

import numpy as np
import pytest

from kqprefill.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen3.gguf"
# Released tests carry a case a family and a format; a development tree has the rest beside or inside it.
CONFORMANCE_FOLDERS = [ROOT / "tests" / "data", ROOT.parent / "shared" / "conformance", ROOT / "shared" / "conformance"]
GOLDEN_FOLDERS = [ROOT.parent / "shared" / "golden", ROOT / "shared" / "golden", ROOT / "tests" / "data"]


def why_no_gpu():
    try:
        from kqprefill.backends.cuda.device import Gpu

        Gpu(0).close()
    except BackendError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (backend, kernels): what a GPU chooses by itself, and what every GPU can run.
PATHS = [
    ("cpu", "auto"),
    *(pytest.param(("cuda", k), marks=pytest.mark.gpu, id=f"cuda-{k}") for k in ("auto", "portable")),
]


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(reference, got):
    """Mean KL divergence in nats of `got`'s distribution from `reference`'s, both logits [..., V]; NaN stays NaN."""
    p, q = log_softmax(reference), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def relative_error(reference, got):
    """|got - reference| / |reference| in float64; NaN stays NaN."""
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))
