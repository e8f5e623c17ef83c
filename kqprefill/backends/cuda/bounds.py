"""How fast a model can be at best on a GPU: what its arithmetic, its memory and its bus allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...models.family import Family
from .device.gpu import GpuFacts
from .kernel_set import KernelSet
from .weights.matrix import layer_matrices
from .weights.plan import Plan

# Operations in half precision that a multiprocessor does in a cycle, sums in float32 (NVIDIA's architecture papers), by
# compute capability.
_OPERATIONS = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_OTHERS_OPERATIONS = 512  # GeForce and its like


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


def peak(facts: GpuFacts) -> float:
    """Operations a second of a GPU's matrix units, halves into float32."""
    return _OPERATIONS.get(facts.capability, _OTHERS_OPERATIONS) * facts.multiprocessors * facts.clock


def flops(plan: Plan, family: Family, tokens: int) -> float:
    """Operations of a prompt's layers, each query over all keys before it."""
    elements = sum(sum(family.head_dims(index)) for index in range(family.config.block_count))
    return plan.needs.matrix_flops / plan.tokens * tokens + tokens**2 * family.config.head_count * elements


def estimate(plan: Plan, family: Family, facts: GpuFacts, kernel_set: KernelSet) -> dict[str, float]:
    """What bounds a prompt of plan.tokens: {"compute_seconds", "tflops"}, and where layers are streamed "bus_seconds",
    "bus_gb_per_s" and "free_from_tokens", the prompt length at which the copies take no longer than the arithmetic."""
    rate = peak(facts) * kernel_set.share_of_peak
    bounds = {"compute_seconds": flops(plan, family, plan.tokens) / rate, "tflops": rate / 1e12}
    if plan.streamed:
        bus = facts.bus_rate()
        seconds = plan.streamed_bytes / bus
        enough = (n for n in range(64, 1 << 20, 64) if flops(plan, family, n) / rate >= seconds)
        bounds |= {"bus_seconds": seconds, "bus_gb_per_s": bus / 1e9, "free_from_tokens": next(enough, 1 << 20)}
    return bounds


def floors(plan: Plan, family: Family, facts: GpuFacts) -> list[tuple[str, Callable[[int], float]]]:
    """[(what, seconds of a prompt of so many tokens)]: no kernel can be faster than either."""
    rate = peak(facts)
    arithmetic = f"arithmetic: {rate / 1e12:.0f} TFLOP/s"
    if plan.streamed:
        bus = facts.bus_rate()
        what, seconds = f"streamed weights over the bus: {bus / 1e9:.0f} GB/s", plan.streamed_bytes / bus
    else:
        nbytes = sum(tensor.nbytes for layer in layer_matrices(family) for tensor in layer)
        what, seconds = f"reading each weight once: {facts.memory_rate / 1e12:.2f} TB/s", nbytes / facts.memory_rate
    return [(arithmetic, lambda tokens: flops(plan, family, tokens) / rate), (what, lambda tokens: seconds)]
