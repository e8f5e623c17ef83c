"""The reference backend: NumPy float32, matrices decoded and multiplied on all cores."""

from __future__ import annotations

import os
import platform
import time

from ...collector import Collector
from ...core import Batch, Logits, PendingHead, Progress, no_progress
from ...models.family import Family
from ...models.precision import Precision
from ...timeline import Stage, Timeline
from ..base import Backend, Cache, StateAccess
from ..budget import Budget
from .collector import CpuCollector
from .ops import CpuCache, CpuOps
from .states import CpuStates
from .threads import blas
from .weights import DecodedWeights

_SAME_BITS = "KQPREFILL_SAME_BITS"  # =1: a token's bits do not depend on how prompts are cut or packed (steady.py)


class CpuBackend(Backend):
    """Runs any model, one at a time; it plans nothing."""

    name = "cpu"

    def __init__(self) -> None:
        self.device_name = _processor_name()
        self._weights: DecodedWeights | None = None
        self._precision: Precision = "exact"

    def load(
        self,
        family: Family,
        progress: Progress,
        vram: Budget | None = None,
        tokens: int | None = None,
        ranks: bool = False,
        precision: Precision = "exact",
    ) -> None:
        self._precision = precision
        self._weights = DecodedWeights()  # from the mapped file, as they are used

    def new_cache(self, family: Family, capacity: int) -> Cache:
        return CpuCache(family.layer_states, capacity)

    def state_access(self, family: Family, cache: Cache, writing: bool = False) -> StateAccess:
        assert isinstance(cache, CpuCache), "a cache of another backend"
        return CpuStates(cache)

    def new_collector(self, family: Family, output: bool, progress: Progress = no_progress) -> Collector:
        return CpuCollector(output)

    def run(
        self,
        family: Family,
        batch: Batch,
        cache: Cache | None,
        logits: Logits,
        progress: Progress,
        timed: bool = False,
        collector: Collector | None = None,
    ) -> tuple[PendingHead, dict[str, Stage] | None]:
        assert cache is None or isinstance(cache, CpuCache), "a cache of another backend"
        ops = CpuOps(family, batch, cache, self._weights, self._precision, os.environ.get(_SAME_BITS) == "1")
        ops.collector = collector
        if timed:
            ops.timeline = Timeline(time.perf_counter, lambda start, end: end - start)
        with blas().one_thread():
            pending = family.finish(ops, family.forward(ops, progress), logits)
        return pending, ops.timeline.stages() if ops.timeline is not None else None

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
