"""The reference backend: NumPy float32, one BLAS call a matrix, nothing clever."""

import platform
import time

import numpy as np

from ..base import Backend, Cache
from ..timeline import Timeline
from .ops import CpuOps


class CpuCache(Cache):
    def __init__(self, config, capacity):
        super().__init__(capacity)
        shape = (config.block_count, capacity, config.head_count_kv, config.head_dim)
        self.k, self.v = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def close(self):
        self.k = self.v = None


class CpuBackend(Backend):
    name = "cpu"

    def __init__(self):
        self.device_name = _processor_name()

    def load(self, model, progress, vram=None, tokens=None, ranks=False):
        pass  # matrices are dequantised from the mapped file as they are used

    def new_cache(self, model, capacity):
        return CpuCache(model.config, capacity)

    def run(self, model, batch, cache, logits, forward, progress, timed=False):
        ops = CpuOps(model.config, batch, cache)
        if timed:
            ops.timeline = Timeline(time.perf_counter, lambda start, end: end - start)
        head = model.head(ops, forward(ops), logits)
        return head, ops.timeline.stages() if timed else None


def _processor_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
