"""Multi-head latent attention on CUDA against NumPy: one prompt, sequences packed together, sequences that go on."""

import pytest

from kqprefill.backends.cpu.ops import CpuOps
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.core import Batch, Segment, no_progress
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile
from op_models import LATENT_MODELS
from test_cuda_ops import BothOps, cuda, poisoned  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=LATENT_MODELS)
def family(request, cuda):  # noqa: F811
    """A family whose model is on the GPU."""
    description, kind = LATENT_MODELS[request.param]
    opened = read_model(SyntheticFile(description, lambda *_: kind, request.param))
    cuda.load(opened, no_progress)
    yield opened
    cuda.unload()


def run(family, context, batch, caches=(None, None)):
    """Compare a batch's ops, layer by layer; caches: the CPU's and the GPU's."""
    cpu, gpu = (
        CpuOps(family, batch, caches[0]),
        CudaOps(context, family, batch, caches[1]),
    )
    family.forward(BothOps(cpu, gpu))


def ids(rng, n):
    return rng.integers(0, 160, n).astype("int32")


@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 129, 300])
def test_a_prompt(cuda, family, n, rng):  # noqa: F811
    context = poisoned(cuda.context)
    try:
        run(family, context, Batch(ids(rng, n)))
    finally:
        context.work.close()


@pytest.mark.parametrize("shared", [1, 63, 64, 130])
def test_packed_sequences(cuda, family, shared, rng):  # noqa: F811
    """One alone, and two that continue the same one, of which the first keys are copied."""
    segments = (
        Segment(0, 70),
        Segment(70, shared),
        Segment(70 + shared, 5, shared, 1),
        Segment(75 + shared, 90, shared, 1),
    )
    context = poisoned(cuda.context)
    try:
        run(family, context, Batch(ids(rng, 165 + shared), segments=segments))
    finally:
        context.work.close()


@pytest.mark.parametrize("pieces", [(1, 63, 64, 65), (100, 1, 1, 150)])
def test_a_sequence_that_goes_on(cuda, family, pieces, monkeypatch, rng):  # noqa: F811
    """Of which some latent rows are multiplied at a time, so that pieces begin within what a cache has."""
    from kqprefill.backends.cpu.backend import CpuBackend
    from kqprefill.backends.cuda.kv_cache import DeviceCache
    from kqprefill.backends.cuda.ops import latent

    monkeypatch.setattr(latent, "_rows_at_once", lambda width: 96)
    caches = CpuBackend().new_cache(family, 300), DeviceCache(cuda.gpu, family.layer_states, 300)
    try:
        at = 0
        for n in pieces:
            run(family, cuda.context, Batch(ids(rng, n), start=at), caches)
            at += n
    finally:
        caches[1].close()
