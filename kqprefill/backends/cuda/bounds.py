"""How fast a model can be at best on a GPU: what its arithmetic, its memory and its bus allow."""

import math
from types import SimpleNamespace

from .weights import layer_tensors

# Operations in half precision that a multiprocessor does in a cycle, sums in float32 (NVIDIA's architecture papers), by
# compute capability; and the share of it that whole prompts have reached: wgmma, and mma.sync (docs/performance.md).
_OPERATIONS = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_OTHERS_OPERATIONS = 512  # GeForce and its like
_HOPPER_SHARE, _PORTABLE_SHARE = 0.6, 0.35

H100 = SimpleNamespace(
    capability=(9, 0),
    multiprocessors=132,
    shared_memory=227 << 10,
    clock=1.98e9,
    memory_rate=3.35e12,
    bus_rate=lambda: 55e9,
)


def peak(facts):
    """Operations a second of a GPU's matrix units, halves into float32."""
    return _OPERATIONS.get(facts.capability, _OTHERS_OPERATIONS) * facts.multiprocessors * facts.clock


def flops(family, tokens):
    """Operations of a prompt's layers, each query over all keys before it."""
    c = family.config
    part = family.experts.used / family.experts.count if family.has_experts else 1.0  # of the experts, for each token
    tensors = [tensor for layer in layer_tensors(family) for tensor in layer]
    weights = sum(math.prod(tensor.shape) * (part if len(tensor.shape) == 3 else 1) for tensor in tensors)
    return 2 * tokens * weights + 2 * tokens**2 * c.q_width * c.block_count


def estimate(plan, family, facts):
    """What bounds a prompt of plan.tokens: {"compute_seconds", "tflops"}, and where layers are streamed "bus_seconds",
    "bus_gb_per_s" and "free_from_tokens", the prompt length at which the copies take no longer than the arithmetic."""
    rate = peak(facts) * (_HOPPER_SHARE if facts.capability == (9, 0) else _PORTABLE_SHARE)
    found = {"compute_seconds": flops(family, plan.tokens) / rate, "tflops": rate / 1e12}
    if plan.streamed:
        bus = facts.bus_rate()
        enough = (n for n in range(64, 1 << 20, 64) if flops(family, n) / rate >= plan.streamed_bytes / bus)
        found |= {
            "bus_seconds": plan.streamed_bytes / bus,
            "bus_gb_per_s": bus / 1e9,
            "free_from_tokens": next(enough, 1 << 20),
        }
    return found


def floors(plan, family, facts):
    """[(what, seconds of a prompt of so many tokens)]: no kernel can be faster than either."""
    rate, nbytes = peak(facts), sum(tensor.nbytes for layer in layer_tensors(family) for tensor in layer)
    found = [(f"arithmetic: {rate / 1e12:.0f} TFLOP/s", lambda tokens: flops(family, tokens) / rate)]
    if plan.streamed:
        bus = facts.bus_rate()
        return [
            *found,
            (f"streamed weights over the bus: {bus / 1e9:.0f} GB/s", lambda tokens: plan.streamed_bytes / bus),
        ]
    memory = facts.memory_rate
    return [*found, (f"reading each weight once: {memory / 1e12:.2f} TB/s", lambda tokens: nbytes / memory)]
