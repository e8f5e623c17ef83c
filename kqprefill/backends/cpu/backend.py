"""The reference backend: NumPy float32, one BLAS call a matrix, nothing clever."""

from __future__ import annotations

import platform
import time

from ...core import Batch, Logits, PendingHead, Progress
from ...models.family import Family
from ...timeline import Stage, Timeline
from ..base import Backend, Cache
from ..budget import Budget
from .ops import CpuCache, CpuOps


class CpuBackend(Backend):
    """Runs any model; it keeps nothing of the weights, and plans nothing."""

    name = "cpu"

    def __init__(self) -> None:
        self.device_name = _processor_name()

    def load(
        self,
        family: Family,
        progress: Progress,
        vram: Budget | None = None,
        tokens: int | None = None,
        ranks: bool = False,
    ) -> None:
        pass  # matrices are dequantised from the mapped file as they are used

    def new_cache(self, family: Family, capacity: int) -> Cache:
        return CpuCache(family.layer_states, capacity)

    def run(
        self,
        family: Family,
        batch: Batch,
        cache: Cache | None,
        logits: Logits,
        progress: Progress,
        timed: bool = False,
    ) -> tuple[PendingHead, dict[str, Stage] | None]:
        assert cache is None or isinstance(cache, CpuCache), "a cache of another backend"
        ops = CpuOps(family.config, batch, cache)
        if timed:
            ops.timeline = Timeline(time.perf_counter, lambda start, end: end - start)
        pending = family.head(ops, family.forward(ops, progress), logits)
        return pending, ops.timeline.stages() if ops.timeline is not None else None


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
