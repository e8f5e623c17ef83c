"""The ops that only the CPU has; models that need them are refused before they run (weights/plan.py)."""

from __future__ import annotations

from ....models.ops import Ops, Residual
from ....models.weights import Weight, Weights


class CpuOnlyOps(Ops):
    """Part of CudaOps."""

    def altup_streams(self, x: Residual, matrices: Weight) -> Residual:
        raise NotImplementedError("several residual streams are not on CUDA")

    def altup_predict(self, x: Residual, w: Weights) -> tuple[Residual, Residual]:
        raise NotImplementedError("several residual streams are not on CUDA")

    def altup_correct(self, x: Residual, made: Residual, w: Weights) -> Residual:
        raise NotImplementedError("several residual streams are not on CUDA")

    def altup_merge(self, x: Residual, matrices: Weight) -> Residual:
        raise NotImplementedError("several residual streams are not on CUDA")
