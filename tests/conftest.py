"""Shared test data and helpers.

Tests marked `gpu` are skipped, visibly, where no NVIDIA GPU can be used. Tests marked `slow` are left out unless
`pytest -m slow` asks for them. Random inputs come from the fixture `rng`, whose seed a failing test reports.
"""

import os
from pathlib import Path
import secrets
import zlib

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    # BLAS reads these when NumPy is imported. For models as small as the tests' its threads only wait for one another.
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import kqprefill  # noqa: E402
from kqprefill.errors import BackendError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen3.gguf"
# Released tests carry a case a family and a format; a development tree has the rest beside or inside it.
CONFORMANCE_FOLDERS = [ROOT / "tests" / "data", ROOT.parent / "shared" / "conformance", ROOT / "shared" / "conformance"]
CASES = {path.stem: path for folder in reversed(CONFORMANCE_FOLDERS) for path in sorted(folder.glob("*.gguf"))}
GOLDEN_FOLDERS = [ROOT.parent / "shared" / "golden", ROOT / "shared" / "golden", ROOT / "tests" / "data"]

if Path(kqprefill.__file__).parents[1] == ROOT:
    # The commands that tests start are this source tree's too, and not those of a version that is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

SEED = int(os.environ.get("KQPREFILL_TEST_SEED") or secrets.randbits(32))
os.environ["KQPREFILL_TEST_SEED"] = str(SEED)  # for the processes that run tests side by side


def id_of(item):
    """A test's id, without the group that pytest-xdist adds."""
    return item.nodeid.removesuffix("@gpu")


def seed_of(item):
    """A test's own seed, so that its inputs are the same whether it runs alone or among others."""
    return [SEED, zlib.crc32(id_of(item).encode())]


@pytest.fixture
def rng(request):
    """A numpy.random.Generator for a test's inputs: others in every run, or those of $KQPREFILL_TEST_SEED."""
    return np.random.default_rng(seed_of(request.node))


@pytest.fixture(scope="module")
def module_rng(request):
    """As `rng`, for fixtures that all tests of a module share."""
    return np.random.default_rng(seed_of(request.node))


def pytest_report_header():
    return f"random inputs: KQPREFILL_TEST_SEED={SEED}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed and {"rng", "module_rng"} & set(item.fixturenames):
        again = f"KQPREFILL_TEST_SEED={SEED} pytest -n 0 '{id_of(item)}'"
        report.sections.append(("random inputs", f"The same ones again: {again}"))


def found(names):
    """The paths of those of the conformance models that are here."""
    return [CASES[name] for name in names.split() if name in CASES]


def why_no_gpu():
    """Why no NVIDIA GPU can be used, or None where one can."""
    try:
        from kqprefill.backends.cuda.device.gpu import Gpu

        Gpu(0).close()
    except BackendError as error:
        return str(error)
    return None


# How large a part of the slow emulated tests runs, of most programs is compiled, and of damaged files is tried, others
# with each seed: CI has no time for all of them in each run.
SLOW_SHARE = float(os.environ.get("KQPREFILL_SLOW_SHARE", 1))


def is_taken(name):
    """Whether something of that name is in the share."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode()), 1]).random() < SLOW_SHARE


def share_of(count):
    """How many of so many files a slow test tries."""
    return max(1, round(count * SLOW_SHARE))


def left_out(item):
    """Whether a test is an emulated one that does not run with this seed."""
    emulated = item.path.stem in ("test_emulated", "test_emulated_shapes", "test_heads", "test_last_position")
    return emulated and item.get_closest_marker("slow") is not None and not is_taken(id_of(item))


def pytest_collection_modifyitems(config, items):
    taken, dropped = [], []
    for item in items:
        (dropped if left_out(item) else taken).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = taken
    marked = [item for item in items if item.get_closest_marker("gpu")]
    for item in marked:
        item.add_marker(pytest.mark.xdist_group("gpu"))  # one process has the GPU
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
    """Natural log-probabilities of logits [..., V], in float64."""
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
