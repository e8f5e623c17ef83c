"""How much work memory a batch takes: its ops are gone through without a GPU, and the buffers that they ask for are counted."""

from types import SimpleNamespace

import numpy as np

from ..base import Batch, Targets
from .memory import aligned
from .ops import CudaOps
from .weights import matrix_of


_TOP = 32  # likeliest tokens asked for, at a guess


class Sizes:
    """In place of a Workspace: the largest size asked for under each name."""

    def __init__(self):
        self.sizes = {}

    def get(self, name, nbytes):
        self.sizes[name] = max(self.sizes.get(name, 0), aligned(nbytes))
        return 1 << 40


class NoWeights:
    """In place of DeviceWeights: the matrices' shapes, and norms of ones."""

    streaming = False

    def __init__(self, host_embedding):
        self._host_embedding = host_embedding

    def matrix(self, weight):
        return matrix_of(weight.tensor, 1 << 40)

    def on_host(self, weight):
        return self._host_embedding

    def host_rows(self, weight, rows):
        return np.empty((len(rows), weight.tensor.nbytes // weight.shape[0]), np.uint8)

    def vector(self, *tensors):
        return 1 << 40, np.ones(sum(t if isinstance(t, int) else t.shape[0] for t in tensors), np.float32)

    def scale(self, key, make):
        make(1 << 40)
        return 1 << 40

    def absmax(self, weight):
        return 1.0

    def constant(self, array):
        return 1 << 40

    constant_scale = constant

    def descriptor(self, key, make):
        return 1 << 40


class NoKernels:
    """In place of Kernels: launches nothing; programs: those that were to be prepared."""

    overlap, programs = False, ()

    def prepare(self, programs, progress):
        self.programs = list(programs)

    def launch(self, *args, **kwargs):
        pass

    def fence(self):
        pass


def stand_in(facts, hopper, kernels=None, host_embedding=False):
    """What CudaOps takes for a backend, without a GPU.

    facts: has capability, multiprocessors and shared_memory (bytes a block may have), as a Gpu does.
    """

    def nothing(*_, **__):
        pass

    gpu = SimpleNamespace(
        capability=facts.capability,
        multiprocessors=facts.multiprocessors,
        shared_memory=facts.shared_memory,
        upload=nothing,
        zero=nothing,
    )
    return SimpleNamespace(
        gpu=gpu,
        hopper=hopper,
        kernels=kernels or NoKernels(),
        workspace=Sizes(),
        weights=NoWeights(host_embedding),
        downloads=SimpleNamespace(start=nothing),
    )


def batch_of(tokens, ranks):
    """A batch of so many tokens: a prompt, or (ranks) sequences of which each position is a target."""
    ids = np.zeros(tokens, np.int32)
    return Batch(ids, targets=Targets(np.arange(tokens, dtype=np.int32), ids, _TOP) if ranks else None)


def rehearse(family, facts, hopper, tokens, ranks=False, host_embedding=False):
    """Bytes of work buffers of such a batch (`batch_of`), the logits of all of a prompt's positions apart."""
    backend = stand_in(facts, hopper, host_embedding=host_embedding)
    ops = CudaOps(backend, family.config, batch_of(tokens, ranks), None)
    if ranks:  # many short sequences: as many keys again, that several have for themselves
        ops.kv_rows *= 2
    x = family.embed(ops, ops.batch.tokens)
    for index, weights in enumerate(family.blocks):
        ops.begin_layer(index)
        x = family.layer(ops, weights, x, index)
    if ranks:
        family.head(ops, x, "ranks")
    backend.workspace.get("logits", 4 * family.config.vocab_size)
    return sum(backend.workspace.sizes.values())


def products_of(family, facts, hopper, tokens, ranks=False):
    """The programs that multiply, for such a batch."""
    backend = stand_in(facts, hopper)
    CudaOps(backend, family.config, batch_of(tokens, ranks), None).prepare(family, "ranks" if ranks else None, None)
    return backend.kernels.programs
