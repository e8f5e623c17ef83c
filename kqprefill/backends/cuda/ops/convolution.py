"""Gated causal convolutions by themselves (LFM2, arXiv 2511.23404; kernels/convolution.cu)."""

from __future__ import annotations

import numpy as np

from ....core import Int32Array, Segment
from ....models.family import Family
from ....models.weights import Weights
from ..device.arrays import FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..mamba_kernels import convolution_program
from .batch import TOKENS_AT_ONCE
from .recurrence import RecurrenceOps

_NONE = -(1 << 15)  # in the place of a row, where the sequence has none


def rows_before(segments: tuple[Segment, ...], taps: int) -> Int32Array:
    """The rows of a batch that a convolution goes over, int32 [T, taps + 1], each token's own last; negative ones are
    of a cache, whose last row is -1; _NONE where a sequence has not begun."""
    found = []
    for segment in segments:
        positions = segment.position + np.arange(segment.length)[:, None] + np.arange(-taps, 1)
        rows = segment.first + positions - segment.position
        earlier = positions < segment.position
        if segment.after is not None:  # that one begins with its sequence
            rows = np.where(earlier, segments[segment.after].first + positions, rows)
        else:
            rows = np.where(earlier, positions - segment.position, rows)
        found.append(np.where(positions < 0, _NONE, rows))
    return np.concatenate(found).astype(np.int32)


class ConvolutionOps(RecurrenceOps):
    """Part of CudaOps."""

    def begin_batch(self, family: Family) -> None:
        super().begin_batch(family)
        self._rows: DeviceArray | None = None
        if family.short_taps is not None:
            self._rows = self.keep("rows of taps", rows_before(self.batch.segments, family.short_taps - 1))

    def short_convolution(self, h: Operand, w: Weights) -> Operand:
        assert h.length is not None, "what goes into a convolution comes from a norm"
        assert self._rows is not None, "the family says how many taps there are"
        weight, matrix, bias = w.shortconv_in_proj, self.matrix(w.shortconv_in_proj), self.bias(w.shortconv_in_proj)
        self.hear([weight], h)
        taps, columns, kernel = self.vector(w.shortconv_conv), matrix.rows // 3, self._rows.shape[1]
        kept, halo, program = None, kernel - 1, convolution_program(kernel)
        product = self.work.array("convolution products", FLOAT32, halo + self.n, columns)
        if self.cache is not None:
            kept = self.cache.recurrent(self.layer)
            if self.batch.start:
                self.copy(product.rows(0, halo), kept.sums)
        out = self.work.array("convolved", HALVES.dtype, self.n, HALVES.padded(columns))
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            sums = self.work.array("convolution sums", FLOAT32, end - t, matrix.rows)
            self.enter("linear", [weight], end - t)
            self.multiply(h.part(t, end), [matrix], sums, bias)
            self.enter("rest")
            scale = self._convolution_scale(w, matrix.name, h.length, kernel)
            self.launcher.launch(
                program,
                "convolution_inputs",
                grid=end - t,
                sums=sums,
                columns=columns,
                product=product.rows(halo + t),
            )
            self.launcher.launch(
                program,
                "convolve",
                grid=end - t,
                sums=sums,
                product=product.rows(halo),
                taps=taps,
                rows=self._rows.rows(t, end),
                columns=columns,
                scale=scale,
                out=out.rows(t, end),
                stride=out.shape[1],
            )
        if kept is not None:
            self.copy(kept.sums, product.rows(self.n, self.n + halo))
        return Operand(out, columns, scale)

    def _convolution_scale(self, w: Weights, name: str, length: float, kernel: int) -> DeviceArray:
        matrix = self.matrix(w.shortconv_in_proj)

        def make(scale: DeviceArray) -> None:
            self.launcher.launch(
                convolution_program(kernel),
                "convolution_scale",
                grid=1,
                row_norms=self.scales.row_norms(matrix),
                sum_bias=self.bias(w.shortconv_in_proj),
                taps=self.vector(w.shortconv_conv),
                columns=matrix.rows // 3,
                gain=length,
                scale=scale,
            )

        return self.scales.made(name, 1, make)
