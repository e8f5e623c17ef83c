"""What the ops of every batch work with."""

from __future__ import annotations

from dataclasses import dataclass

from ..device.gpu import Gpu
from ..device.launcher import Launches
from ..device.workspace import Downloads, Workspace
from ..gemm.tensor_maps import TensorMaps
from ..kernel_set import Gemms, KernelSet
from ..weights.scales import Scales
from ..weights.small_arrays import SmallArrays
from ..weights.store import WeightStore


@dataclass(frozen=True)
class Context:
    """A GPU with its kernels, its memory and a model's weights; or, in a rehearsal, what stands in for them."""

    gpu: Gpu
    kernel_set: KernelSet
    launcher: Launches
    work: Workspace
    downloads: Downloads
    maps: TensorMaps
    weights: WeightStore
    small: SmallArrays
    scales: Scales
    gemms: Gemms

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        kernel_set: KernelSet,
        launcher: Launches,
        work: Workspace,
        downloads: Downloads,
        maps: TensorMaps,
        weights: WeightStore,
        small: SmallArrays,
    ) -> Context:
        """With the scales and the ways to multiply that follow from the others."""
        scales = Scales(gpu, launcher, work, small)
        gemms = kernel_set.gemms(gpu, launcher, work, maps, weights.halves)
        return cls(gpu, kernel_set, launcher, work, downloads, maps, weights, small, scales, gemms)
