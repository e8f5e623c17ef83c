"""The powers of two that keep half-precision operands in range (kernels/scales.cu), each made the first time it is
needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

import numpy as np

from ..constants import THREADS
from ..device.arrays import FLOAT32, UINT32, DeviceArray
from ..device.gpu import Gpu
from ..device.launcher import Launches
from ..device.workspace import Workspace
from ..programs import INT8, SCALES, weight_program
from .matrix import Matrix
from .small_arrays import SmallArrays

_HALF_TOP = 15  # values are scaled to at most 2^15, a factor of 2 under overflow (kernels/scales.cu: kHalfTop)
_SCALE = FLOAT32, (1,)


class Scales:
    """Scales as device arrays, float32 [1]. Those of weights and of what they make are found on the device."""

    def __init__(self, gpu: Gpu, launcher: Launches, work: Workspace, small: SmallArrays) -> None:
        self._gpu, self._launcher, self._work, self._small = gpu, launcher, work, small
        self._absmax: dict[str, float] = {}

    def of_bound(self, bound: float) -> DeviceArray:
        """The scale of values whose magnitude is at most `bound`: kernels/scales.cu's scale_for, on the host."""

        def make(scale: DeviceArray) -> None:
            exponent = _HALF_TOP - math.frexp(bound)[1] if bound > 0 else 0
            self._gpu.upload(scale.address, np.array([2.0 ** max(-126, min(126, exponent))], np.float32))

        return self._small.once(("bound", float(bound)), *_SCALE, make)

    def made(self, name: str, count: int, make: Callable[[DeviceArray], None]) -> DeviceArray:
        """Scales of what is not the outcome of one matrix, float32 [count], which make(array) writes the first time."""
        return self._small.once(("made", name), FLOAT32, (count,), make)

    def unit(self) -> DeviceArray:
        """1: of what is not scaled."""
        return self._small.constant(np.ones(1, np.float32))

    def of_weights(self, matrices: Sequence[Matrix], norm: DeviceArray | None) -> DeviceArray:
        """The scale of the halves that these matrices, or those of them that are not in int8, are multiplied as.

        norm: the RMSNorm weight that their input was multiplied by, or None. Also measures their rows against it, which
        `of_outputs` asks for.
        """

        def make(scale: DeviceArray) -> None:
            largest = self._measure(matrices, norm)
            self._launcher.launch(SCALES, "weight_scale", grid=1, absmax=largest, scale=scale)

        return self._small.once(("weights", *(matrix.name for matrix in matrices)), *_SCALE, make)

    def _measure(self, matrices: Sequence[Matrix], norm: DeviceArray | None) -> DeviceArray:
        """Measure matrices' rows; the bits of the largest magnitude of those that are not in int8."""
        largest = self._work.array("absmax", UINT32, 1)
        self._gpu.zero(largest.address, largest.nbytes)
        for matrix in matrices:
            if matrix.int8:
                self._measure_int8(matrix, norm)
                continue
            self._launcher.launch(
                weight_program(matrix.type),
                "measure",
                grid=matrix.row_tiles,
                weights=matrix.array,
                units=matrix.units,
                rows=matrix.rows,
                columns=matrix.columns,
                input=norm,
                row_norm=self.row_norms(matrix),
                absmax=largest,
            )
        return largest

    def _measure_int8(self, matrix: Matrix, norm: DeviceArray | None) -> None:
        """Measure the rows of a matrix in int8, with room for what rounding its inputs adds to them."""
        self._launcher.launch(
            INT8,
            "measure_int8",
            grid=-(-matrix.rows // (THREADS["measure_int8"] // 32)),
            tiles=matrix.array,
            scales=matrix.scales,
            rows=matrix.rows,
            columns=matrix.columns,
            groups=matrix.units,
            input=norm,
            row_norm=self.row_norms(matrix),
            absmax=self._work.array("absmax of int8", UINT32, 1),
        )

    def absmax(self, matrix: Matrix) -> float:
        """The largest magnitude in a matrix, for the host, which waits for it the first time."""
        if matrix.name not in self._absmax:
            largest = np.zeros(1, np.float32)
            self._gpu.download(largest, self._measure([matrix], None).address)
            self._absmax[matrix.name] = float(largest[0])
        return self._absmax[matrix.name]

    def of_outputs(
        self,
        matrix: Matrix,
        length: float,
        bias: DeviceArray | None,
        factor: Matrix | None = None,
        factor_bias: DeviceArray | None = None,
        input_scale: DeviceArray | None = None,
    ) -> DeviceArray:
        """The scale of what a measured matrix makes of inputs, or (factor) of its product with what that one makes.

        length: an input row's Euclidean length, divided by the norm that the rows were measured against, is at most
        this. input_scale: of inputs that nothing bounds but their scale; length is then that of a row of ones.
        """

        def make(scale: DeviceArray) -> None:
            self._launcher.launch(
                SCALES,
                "output_scale",
                grid=1,
                a=self.row_norms(matrix),
                bias_a=bias,
                b=self.row_norms(factor) if factor is not None else None,
                bias_b=factor_bias,
                n=matrix.rows,
                gain=length,
                input_scale=input_scale,
                scale=scale,
            )

        return self._small.once(("outputs", matrix.name), *_SCALE, make)

    def squared(self, scale: DeviceArray) -> DeviceArray:
        """The scale of the squares of values that are scaled by *scale."""

        def make(squared: DeviceArray) -> None:
            self._launcher.launch(SCALES, "square_scale", grid=1, source=scale, out=squared)

        return self._small.once(("squared", scale.address), *_SCALE, make)

    def divided(self, scale: DeviceArray, factor: float) -> DeviceArray:
        """*scale / factor: a product whose operand is said to be scaled so comes out times `factor`."""

        def make(divided: DeviceArray) -> None:
            self._launcher.launch(SCALES, "divide_scale", grid=1, source=scale, factor=factor, out=divided)

        return self._small.once(("divided", scale.address, factor), *_SCALE, make)

    def row_norms(self, matrix: Matrix) -> DeviceArray:
        """The lengths of a measured matrix's rows, each times the norm that it was measured against: float32 [rows]."""
        return self._work.array(f"row norms {matrix.name}", FLOAT32, matrix.rows)
