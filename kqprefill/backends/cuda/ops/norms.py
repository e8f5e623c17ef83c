"""Norms of the residual stream, and norms' outputs that are added to it."""

from __future__ import annotations

from dataclasses import replace
import math

import numpy as np

from ....models.ops import Sums
from ....models.weights import Weight
from ..constants import SHARED_ROW
from ..device.arrays import FLOAT32, DeviceArray
from ..device.launcher import begun_early
from ..device.signatures import Argument
from ..gemm.operand import BYTES, HALVES, MORE_ROWS, Operand
from ..programs import EXPERTS, NORM, rounded_norm
from .batch import BatchOps, Residual, ResidualBound


class NormOps(BatchOps):
    """Part of CudaOps."""

    def norm(self, x: Residual, weight: Weight) -> Operand:
        if x.combination is not None and not self._biased(weight):
            return self.normalise(x.array, weight, copies=x.combination.take())
        return self.normalise(x.values, weight)

    def _biased(self, weight: Weight) -> bool:
        """Whether the mean is subtracted, or a bias added."""
        return self.config.layer_norm or weight.bias is not None

    def normalise(
        self,
        x: DeviceArray,
        weight: Weight,
        picked: DeviceArray | None = None,
        copies: dict[str, Argument] | None = None,
    ) -> Operand:
        """The family's norm of x's rows, or of those whose numbers are picked, int32 [rows]. copies: of experts, which
        are added to all of x's rows first (Combination); not where the norm is _biased."""
        self.enter("rest")
        if self._biased(weight):
            return self._biased_norm(x, weight, picked)
        vector, host = self.context.small.vector(weight.tensor)
        columns, rows = len(host), (x if picked is None else picked).shape[0]
        length = math.sqrt(columns)  # of a row after division by the norm's weight
        if self.context.weights.precision == "int8" and picked is None and weight.name.startswith("blk."):
            halves = weight.name not in self.int8_norms or self.collector is not None
            return self._rounded_norm(x, vector, float(np.abs(host).max()), halves, copies)
        out = Operand(
            self.work.array("normed", HALVES.dtype, rows, HALVES.padded(columns)),
            columns,
            self.scales.of_bound(length * float(np.abs(host).max())),
            vector,
            length,
        )
        more: dict[str, Argument] = {"rows": picked} if copies is None else {"tokens": rows, **copies}
        two_a_block = copies is not None and columns <= SHARED_ROW
        self.launcher.launch(
            NORM if copies is None else EXPERTS,
            "rms_norm" if copies is None else "combine_rms_norm",
            grid=-(-rows // 2) if two_a_block else rows,
            x=x,
            weight=vector,
            out=out.values,
            columns=columns,
            stride=out.values.shape[1],
            epsilon=self.config.norm_epsilon,
            scale=out.scale,
            **more,
        )
        return out

    def _rounded_norm(
        self, x: DeviceArray, vector: DeviceArray, most: float, halves: bool, copies: dict[str, Argument] | None
    ) -> Operand:
        """RMSNorm of x's rows in int8; most: the largest magnitude in the norm's weight; halves: whether others than
        matrices in int8 may read it. Rows that the kernel has no room to keep it writes as halves in any case."""
        rows, columns = x.shape
        length, padded, stride = math.sqrt(columns), BYTES.padded(columns), HALVES.padded(columns)
        rounded = self.work.array("normed in int8", BYTES.dtype, rows, padded)
        scales = self.work.array("normed rows' scales", FLOAT32, rows + MORE_ROWS)
        scale, program = self.scales.of_bound(length * most), rounded_norm(padded)
        halves = halves or columns > program.columns
        values = self.work.array("normed", HALVES.dtype, rows, stride) if halves else None
        with begun_early(self.launcher):
            self.launcher.launch(
                program.program,
                "rms_norm_rounded" if copies is None else "combine_rms_norm_rounded",
                grid=program.blocks(rows),
                x=x,
                rows=rows,
                weight=vector,
                out=values,
                columns=columns,
                stride=stride,
                epsilon=self.config.norm_epsilon,
                scale=scale,
                rounded=rounded,
                padded=padded,
                scales=scales,
                **(copies or {}),
            )
        if values is None:
            return Operand(rounded, columns, scales, vector, length, BYTES)
        return Operand(values, columns, scale, vector, length, rounded=(rounded, scales))

    def _biased_norm(self, x: DeviceArray, weight: Weight, picked: DeviceArray | None) -> Operand:
        """As `normalise`, where the mean is subtracted or a bias added."""
        vector, host = self.context.small.vector(weight.tensor)
        bias, host_bias = None, np.zeros(1, np.float32)
        if weight.bias is not None:
            bias, host_bias = self.context.small.vector(weight.bias)
        columns, rows = len(host), (x if picked is None else picked).shape[0]
        length = math.sqrt(columns)  # of a row that is normalised, before its weights
        most = length * float(np.abs(host).max())
        out = Operand(
            self.work.array("normed", HALVES.dtype, rows, HALVES.padded(columns)),
            columns,
            self.scales.of_bound(most + float(np.abs(host_bias).max())),
            vector if bias is None else None,
            length if bias is None else most + float(np.linalg.norm(host_bias)),
        )
        self.launcher.launch(
            NORM,
            "biased_norm",
            grid=rows,
            x=x,
            weight=vector,
            bias=bias,
            out=out.values,
            columns=columns,
            stride=out.values.shape[1],
            epsilon=self.config.norm_epsilon,
            centred=int(self.config.layer_norm),
            scale=out.scale,
            rows=picked,
        )
        return out

    def add_rms_norm(
        self,
        x: Residual,
        y: Sums,
        weight: Weight,
        factor: Weight | float | None = None,
        row_scale: DeviceArray | None = None,
    ) -> Residual:
        """As Ops.add_rms_norm; row_scale: powers of two that y's rows are to be multiplied by, float32 [T]."""
        self.enter("rest")
        times, x = self._factor(factor), self.stream(x)
        self.launcher.launch(
            NORM,
            "add_rms_norm",
            grid=self.n,
            x=x.values,
            y=y.values if isinstance(y, Residual) else y,
            row_scale=row_scale,
            weight=self.vector(weight),
            columns=weight.shape[0],
            epsilon=self.config.norm_epsilon,
            factor=times,
        )
        return self._bounded(x, weight, times)

    def add_norm_of_norms(
        self, x: Residual, y: Sums, y_norm: Weight, z: Sums, z_norm: Weight, weight: Weight, factor: Weight | None
    ) -> Residual:
        self.enter("rest")
        times = self._factor(factor)
        self.launcher.launch(
            NORM,
            "add_norm_of_norms",
            grid=self.n,
            x=x.values,
            y=y,
            y_weight=self.vector(y_norm),
            z=z,
            z_weight=self.vector(z_norm),
            weight=self.vector(weight),
            columns=weight.shape[0],
            epsilon=self.config.norm_epsilon,
            factor=times,
        )
        return self._bounded(x, weight, times)

    def _factor(self, weight: Weight | float | None) -> float:
        """The one value of a vector, or the number; 1 for None."""
        if isinstance(weight, float):
            return weight
        return 1.0 if weight is None else float(self.context.small.vector(weight.tensor)[1][0])

    def _bounded(self, x: Residual, weight: Weight, factor: float) -> Residual:
        """The residual stream once a norm's output has been added, and all multiplied by a factor."""
        if x.bound is None:
            return x
        _, host = self.context.small.vector(weight.tensor)
        added = x.bound.added + math.sqrt(len(host)) * float(np.abs(host).max())
        return replace(x, bound=ResidualBound(x.bound.embedding, x.bound.scale * factor, added * abs(factor)))
