"""What a batch needs, found by going through its ops without a GPU: work memory, programs, operations."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core import KEYS_PER_TOKEN, Batch, Float32Array, Logits, Targets
from ...gguf import ModelTensor
from ...models.family import Family
from ...models.precision import Precision
from ...models.weights import Weight
from ...timeline import Timeline
from .device.arrays import FLOAT32, UINT8, DeviceArray
from .device.compiler import Program
from .device.gpu import Gpu, GpuFacts
from .device.launcher import Grid
from .device.signatures import Argument, signatures_of
from .device.workspace import Downloads, Workspace, aligned
from .gemm.tensor_maps import TensorMaps
from .kernel_set import KernelSet
from .ops.batch import Residual, ResidualBound, received
from .ops.collector import DeviceCollector
from .ops.context import Context
from .ops.cuda_ops import CudaOps
from .weights.matrix import Matrix, matrix_of
from .weights.plan import BatchNeeds, Plan, make_plan, refuse_unsupported
from .weights.share import Share
from .weights.small_arrays import SmallArrays

LIKELIEST = 32  # tokens that are asked for at each place, at a guess


@dataclass
class _NoBuffer:
    """In place of device memory."""

    handle: int
    size: int

    def close(self, stream: Any) -> None:
        pass


class NoGpu(Gpu):
    """In place of a Gpu with such facts: it gives addresses, and copies nothing."""

    def __init__(self, facts: GpuFacts) -> None:
        self.index = 0
        self.capability, self.multiprocessors = facts.capability, facts.multiprocessors
        self.shared_memory = facts.shared_memory
        self.stream = None
        self._addresses = count(1 << 40, 1 << 40)

    def allocate(self, nbytes: int, what: str) -> _NoBuffer:
        return _NoBuffer(next(self._addresses), aligned(nbytes))

    def upload(self, address: int, array: NDArray[Any], stream: Any = None) -> None:
        pass

    def download(self, array: NDArray[Any], address: int) -> None:
        pass

    def zero(self, address: int, nbytes: int) -> None:
        pass

    def copy(self, to: int, source: int, nbytes: int) -> None:
        pass


class _MeasuredWorkspace(Workspace):
    """A Workspace that knows how large it has become."""

    @property
    def nbytes(self) -> int:
        return sum(buffer.size for buffer in self._buffers.values())


class _NoDownloads(Downloads):
    def start(self, to: NDArray[Any], source: DeviceArray) -> Callable[[], None]:
        return lambda: None


class _NoTensorMaps(TensorMaps):
    def of(self, array: DeviceArray, box_rows: int) -> DeviceArray:
        return DeviceArray(1 << 40, UINT8, (128,))


class _OnesForVectors(SmallArrays):
    """Norms and biases of ones: nothing is read from the file."""

    def vector(self, *tensors: ModelTensor | int) -> tuple[DeviceArray, Float32Array]:
        shapes = [(t,) if isinstance(t, int) else t.shape for t in tensors]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        key: Hashable = ("vector", *(t if isinstance(t, int) else t.name for t in tensors))
        return self.once(key, FLOAT32, shape, lambda array: None), np.ones(shape, np.float32)


class NoWeights:
    """In place of WeightsOnDevice: the matrices' shapes."""

    streaming = False
    halves = None

    def __init__(self, host_embedding: bool, precision: Precision = "exact") -> None:
        self._host_embedding, self.precision = host_embedding, precision

    def matrix(self, weight: Weight) -> Matrix:
        return matrix_of(weight.tensor, 1 << 40, self.precision)

    def on_host(self, weight: Weight) -> bool:
        return self._host_embedding

    def host_rows(self, weight: Weight, rows: NDArray[np.int32]) -> NDArray[np.uint8]:
        return np.empty((len(rows), weight.tensor.nbytes // weight.shape[0]), np.uint8)

    def absmax(self, weight: Weight) -> float:
        return 1.0

    def begin_layer(self, index: int) -> None:
        pass

    def prefetch(self) -> None:
        pass


@dataclass
class LaunchRecorder:
    """In place of a Launcher: notes the programs, and holds each kernel's arguments against its signature."""

    overlap: bool = False
    programs: dict[Program, None] = field(default_factory=dict)
    _checked: set[tuple[str, str]] = field(default_factory=set)

    def launch(self, program: Program, kernel: str, grid: Grid, **arguments: Argument) -> None:
        self.programs[program] = None
        if (program.source, kernel) not in self._checked:
            signatures_of(program.source)[kernel].check(arguments)
            self._checked.add((program.source, kernel))

    def fence(self) -> None:
        pass


def stand_in(
    facts: GpuFacts,
    kernel_set: KernelSet,
    launcher: LaunchRecorder,
    work: Workspace,
    host_embedding: bool = False,
    precision: Precision = "exact",
) -> Context:
    """A Context without a GPU."""
    gpu = NoGpu(facts)
    return Context.of(
        gpu,
        kernel_set,
        launcher,
        work,
        _NoDownloads(gpu),
        _NoTensorMaps(gpu),
        NoWeights(host_embedding, precision),
        _OnesForVectors(gpu),
    )


def planned_batch(tokens: int, ranks: bool) -> Batch:
    """A batch of so many tokens: a prompt, or (ranks) sequences of which each position is a target."""
    ids = np.zeros(tokens, np.int32)
    return Batch(ids, targets=Targets(np.arange(tokens, dtype=np.int32), ids, LIKELIEST) if ranks else None)


def rehearse(
    family: Family,
    facts: GpuFacts,
    kernel_set: KernelSet,
    batch: Batch,
    logits: Logits = None,
    host_embedding: bool = False,
    share: Share | None = None,
    precision: Precision = "exact",
    last_alone: bool = False,
) -> BatchNeeds:
    """What a batch needs whose head is asked for `logits`.

    host_embedding: the embedding's rows come from the host. share: the layers that it goes through, all unless given.
    precision: that the model is opened with. last_alone: as for CudaOps; a plan has room for all positions. For "ranks"
    there is room for as many rows of keys as the batch may have.
    """
    work, launcher = _MeasuredWorkspace(NoGpu(facts)), LaunchRecorder()
    context = stand_in(facts, kernel_set, launcher, work, host_embedding, precision)
    key_rows = KEYS_PER_TOKEN * len(batch.tokens) if logits == "ranks" else 0
    ops = CudaOps(context, family, batch, None, key_rows, last_alone)
    ops.timeline = Timeline(lambda: None, lambda start, end: 0.0)
    share = share or Share.whole(family)
    x = None if share.is_first else Residual(received(ops, family), ResidualBound(family.token_embd, 1.0))
    x = family.forward(ops, layers=share.layers, x=x)
    if share.is_last:
        family.finish(ops, x, logits)
    return BatchNeeds(work.nbytes, tuple(launcher.programs), ops.timeline.stages()["linear"].flops)


def collected_bytes(
    family: Family, facts: GpuFacts, kernel_set: KernelSet, output: bool, precision: Precision = "exact"
) -> int:
    """Device memory that a DeviceCollector's sums take."""
    launcher = LaunchRecorder()
    context = stand_in(facts, kernel_set, launcher, _MeasuredWorkspace(NoGpu(facts)), precision=precision)
    ops = CudaOps(context, family, planned_batch(1, False), None)
    ops.collector = DeviceCollector(output, context.gpu, launcher)
    family.finish(ops, family.forward(ops), None)
    return ops.collector.taken


def plan_model(
    family: Family,
    facts: GpuFacts,
    kernel_set: KernelSet,
    budget: int,
    tokens: int,
    cache_bytes: int = 0,
    ranks: bool = False,
    share: Share | None = None,
    sums_bytes: int = 0,
    precision: Precision = "exact",
) -> Plan:
    """The Plan (weights/plan.py) for a model on a GPU with these facts that may take `budget` bytes.

    tokens: of the longest prompt, or (ranks) of the largest batch with targets. share: the layers that are to run
    there, all unless given. cache_bytes, sums_bytes: device memory that caches, and a collector's sums, hold.
    precision: that the model is opened with. Raises BackendError where the model does not run there.
    """
    refuse_unsupported(family)
    own = share or Share.whole(family)
    batch = planned_batch(tokens, ranks)
    logits: Logits = "ranks" if ranks else None

    def needs(host_embedding: bool) -> BatchNeeds:
        return rehearse(family, facts, kernel_set, batch, logits, host_embedding, own, precision)

    return make_plan(family, budget, tokens, needs, own, cache_bytes, sums_bytes, precision, kernel_set.keeps_halves)
