"""How fast a model can be at best on a GPU, and about how fast it is: what its arithmetic, its memory and its bus
allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
import math

from ...core import KeysValues, Recurrent, SharedKeysValues
from ...errors import BackendError
from ...models.family import Family
from ...models.precision import Precision, takes_int8
from .constants import DELTA_CHUNK
from .device.gpu import GpuFacts
from .kernel_set import KernelSet
from .weights.matrix import layer_matrices, matrix_of
from .weights.plan import Plan
from .weights.staging import STAGING_SLOTS

# Operations in half precision that a multiprocessor does in a cycle, sums in float32 (NVIDIA's architecture papers), by
# compute capability.
_OPERATIONS = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_OTHERS_OPERATIONS = 512  # GeForce and its like
_INT8_OPERATIONS = {(8, 0): 4096, (9, 0): 8192, (10, 0): 16384}  # the same in int8
_OTHERS_INT8_OPERATIONS = 2048
# What experts' products reach of the rate of a dense model's, routing included (Qwen3-30B-A3B: 0.63, Qwen3.6-35B-A3B:
# 0.53), and what recurrences reach of the peak (Qwen3.6-27B and 35B-A3B: 0.042), of 8192 tokens on an H100
# (docs/performance.md).
_EXPERTS_SHARE, _RECURRENCE_SHARE = 0.6, 0.042
_COPYING_SHARE = 0.7  # of the memory's rate that copies within the device reach, read and written (an H100: 0.73)
_INT8_PASSES = 6  # over the file's bytes: read, written in tiles, read twice, and written as a byte for each weight
_STEP = 64  # tokens, of the lengths that are told
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class _Facts:
    """GpuFacts of a GPU that is not here."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    clock: float
    memory_rate: float
    bus: float

    def bus_rate(self) -> float:
        return self.bus


H100 = _Facts((9, 0), 132, 227 << 10, 1.98e9, 3.35e12, 55e9)


def peak(facts: GpuFacts, precision: Precision = "exact") -> float:
    """Operations a second of a GPU's matrix units: halves into float32, or int8 into int32."""
    operations = _OPERATIONS.get(facts.capability, _OTHERS_OPERATIONS)
    if precision == "int8":
        operations = _INT8_OPERATIONS.get(facts.capability, _OTHERS_INT8_OPERATIONS)
    return operations * facts.multiprocessors * facts.clock


def int8_share(family: Family) -> float:
    """What of the layers' products is made in int8 where a model is opened so (models/precision.py)."""
    used = family.experts.used / family.experts.count if family.experts is not None else 1.0
    sizes = [
        (math.prod(w.shape) * (used if "_exps" in w.name else 1.0), takes_int8(w))
        for block in family.blocks
        for w in block
        if w.is_matrix
    ]
    return sum(size for size, int8 in sizes if int8) / sum(size for size, _ in sizes)


def _together(rates: tuple[float, float], int8: float) -> float:
    """The rate of products of which that share is made at the second rate, and the others at the first."""
    return 1 / ((1 - int8) / rates[0] + int8 / rates[1])


def weight_bytes(family: Family, layers: range, precision: Precision = "exact") -> int:
    """Of those layers' matrices, as a batch reads them."""
    tensors = layer_matrices(family)
    matrices = [(matrix_of(tensor, 0, precision), tensor) for index in layers for tensor in tensors[index]]
    return sum(matrix.nbytes if matrix.int8 else tensor.nbytes for matrix, tensor in matrices)


@dataclass(frozen=True)
class Operations:
    """What the layers compute, in multiplications and additions: products with matrices (of experts those used only),
    attention, recurrences; and the head's products."""

    matrices: float
    attention: float
    recurrences: float
    head: float = 0.0

    @property
    def layers(self) -> float:
        """All but the head's."""
        return self.matrices + self.attention + self.recurrences


def operations(plan: Plan, family: Family, tokens: int, ranks: bool = False) -> Operations:
    """The Operations of one prompt of so many tokens; or (ranks) of a batch of short sequences, whose attention is
    counted as nothing, with the logits of each token."""
    matrices = plan.needs.matrix_flops / plan.tokens * tokens
    mixing = [mixers(family, index, tokens, ranks) for index in plan.share.layers]
    head = head_operations(family, tokens) if ranks and plan.share.is_last else 0
    return Operations(matrices, sum(attention for attention, _ in mixing), sum(other for _, other in mixing), head)


def head_operations(family: Family, tokens: int) -> float:
    """Of the logits of so many tokens."""
    return 2.0 * tokens * math.prod(family.output.shape)


def mixers(family: Family, index: int, tokens: int, ranks: bool) -> tuple[float, float]:
    """Of a layer's attention, and of its recurrence, as `operations` counts them."""
    attention = recurrences = 0.0
    for state in family.layer_states[index].parts:
        kept = family.layer_states[state.layer] if isinstance(state, SharedKeysValues) else state
        if isinstance(kept, Recurrent):
            # Chunk by chunk (arXiv 2412.06464): keys and queries with keys, the solved system with keys and values, the
            # scores with values; then three products with the state.
            within = 2 * DELTA_CHUNK * (3 * kept.key_dim + 2 * kept.value_dim)
            recurrences += tokens * kept.heads * (within + 6 * kept.key_dim * kept.value_dim)
        elif not ranks:
            window = kept.window if isinstance(kept, KeysValues) else None
            attention += 2 * family.config.head_count * sum(family.head_dims(index)) * _pairs(tokens, window)
    return attention, recurrences


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


@dataclass(frozen=True)
class Seconds:
    """About what a batch takes.

    resident: if all layers stayed on the device: the arithmetic, or the reading of each weight once where that is
    longer. unpacking: making tiles of streamed layers, between the arithmetic. bus: their copies. copying: these and
    the time in which the bus must wait for a staging buffer.
    """

    resident: float
    unpacking: float = 0.0
    bus: float = 0.0
    copying: float = 0.0

    @property
    def computing(self) -> float:
        """What is not beside something else on the device."""
        return self.resident + self.unpacking

    @property
    def all(self) -> float:
        """All of it: the copies go on beside the rest."""
        return max(self.computing, self.copying)

    @property
    def share(self) -> float:
        """What it has of the rate that it would have if all layers stayed."""
        return self.resident / self.all


class Speed:
    """What batches take of a model on a GPU."""

    def __init__(self, family: Family, facts: GpuFacts, kernel_set: KernelSet, precision: Precision = "exact") -> None:
        self.family, self.precision, self.facts, self.kernel_set = family, precision, facts, kernel_set
        self._reading: dict[range, float] = {}
        self._peak = peak(facts)
        self._rate = self._peak * kernel_set.share_of_peak
        rates = self._rate, peak(facts, "int8") * kernel_set.int8_share_of_peak
        of_matrices = _together(rates, int8_share(family)) if precision == "int8" else self._rate
        self._matrix_rate = of_matrices * (_EXPERTS_SHARE if family.experts is not None else 1)

    @cached_property
    def bus_rate(self) -> float:
        """Bytes a second from the host, measured when first asked for."""
        return self.facts.bus_rate()

    def reading(self, layers: range) -> float:
        """Seconds that reading each weight of those layers once takes; found when first asked for."""
        if layers not in self._reading:
            self._reading[layers] = weight_bytes(self.family, layers, self.precision) / self.facts.memory_rate
        return self._reading[layers]

    def arithmetic(self, done: Operations) -> float:
        """Seconds that the layers' arithmetic takes, at rates that whole prompts have reached."""
        recurrences = done.recurrences / (self._peak * _RECURRENCE_SHARE)
        return done.matrices / self._matrix_rate + done.attention / self._rate + recurrences

    def with_head(self, done: Operations) -> float:
        """Seconds that all of it takes, the head's products included."""
        return self.arithmetic(done) + done.head / self._rate

    def unpacking(self, nbytes: float) -> float:
        """Seconds that making tiles of so many streamed bytes takes, between the arithmetic."""
        passes = _INT8_PASSES if self.precision == "int8" else 2
        return passes * nbytes / (self.facts.memory_rate * _COPYING_SHARE)

    def seconds(self, plan: Plan, tokens: int, ranks: bool = False) -> Seconds:
        """What a prompt, or (ranks) a batch of short sequences, of so many tokens takes under a plan.

        While the head runs the bus can bring as many of the next batch's layers as there are staging buffers.
        """
        done = operations(plan, self.family, tokens, ranks)
        head = done.head / self._rate
        resident = max(self.arithmetic(done), self.reading(plan.share.layers)) + head
        if not plan.streamed:
            return Seconds(resident)
        bus = plan.streamed_bytes / self.bus_rate
        ahead = bus * min(1, STAGING_SLOTS / len(plan.streamed))
        unpacking = self.unpacking(plan.streamed_bytes)
        return Seconds(resident, unpacking, bus, bus + max(0.0, head - ahead))

    def free_under(self, plan: Plan) -> int:
        """From how many tokens of a prompt on the copies of a plan cost nothing; at most _MOST_TOKENS."""
        low, high = 0, _MOST_TOKENS // _STEP
        while high - low > 1:
            middle = (low + high) // 2
            taken = self.seconds(plan, middle * _STEP)
            low, high = (low, middle) if taken.copying <= taken.computing else (middle, high)
        return high * _STEP


def free_from(speed: Speed, made: Plan, plan_for: Callable[[int], Plan]) -> int | None:
    """The length of a prompt from which streaming is free, though a longer one makes more layers leave; None where no
    prompt of the model, within the budget, is that long.

    made: the plan for some length; plan_for(tokens): that for another, which raises BackendError where it does not fit.
    """
    plan, tokens = made, speed.free_under(made)
    while tokens > plan.tokens:
        if tokens > speed.family.config.context_length:
            return None
        try:
            plan = plan_for(tokens)
        except BackendError:
            return None
        tokens = max(tokens, speed.free_under(plan))
    return tokens


def estimate(plan: Plan, speed: Speed) -> dict[str, float]:
    """What bounds a prompt of plan.tokens: {"compute_seconds", "tflops"}, and where layers are streamed "bus_seconds",
    "bus_gb_per_s" and "share_of_resident_rate", about what it has of the rate with all layers on the device.
    """
    done = operations(plan, speed.family, plan.tokens)
    seconds = speed.arithmetic(done)
    bounds = {"compute_seconds": seconds, "tflops": done.layers / seconds / 1e12}
    if plan.streamed:
        taken = speed.seconds(plan, plan.tokens)
        bounds |= {
            "bus_seconds": taken.bus,
            "bus_gb_per_s": speed.bus_rate / 1e9,
            "share_of_resident_rate": taken.share,
        }
    return bounds


def floors(
    plan: Plan, family: Family, facts: GpuFacts, precision: Precision = "exact"
) -> list[tuple[str, Callable[[int], float]]]:
    """[(what, seconds of a prompt of so many tokens)]: no kernel can be faster than either."""
    rate = matrix_rate = peak(facts)
    arithmetic = f"arithmetic: {rate / 1e12:.0f} TFLOP/s"
    if precision == "int8":
        int8_rate = peak(facts, "int8")
        matrix_rate = _together((rate, int8_rate), int8_share(family))
        arithmetic += f", of int8 {int8_rate / 1e12:.0f} TOP/s"
    if plan.streamed:
        bus = facts.bus_rate()
        what, seconds = f"streamed weights over the bus: {bus / 1e9:.0f} GB/s", plan.streamed_bytes / bus
    else:
        rate_read = facts.memory_rate
        read = weight_bytes(family, plan.share.layers, precision)
        what, seconds = f"reading each weight once: {rate_read / 1e12:.2f} TB/s", read / rate_read

    def computing(tokens: int) -> float:
        done = operations(plan, family, tokens)
        return done.matrices / matrix_rate + (done.attention + done.recurrences) / rate

    return [(arithmetic, computing), (what, lambda tokens: seconds)]
