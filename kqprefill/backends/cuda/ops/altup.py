"""Gemma 3n's several residual streams (AltUp, arXiv 2301.13310), and its sparse gates (kernels/altup.cu).

Streams are one array [streams, T, H]: the first is a residual stream by itself, which norms read as any.
"""

from __future__ import annotations

from ....models.weights import Weight, Weights
from ..constants import ALTUP_STREAMS
from ..device.arrays import FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..programs import ALTUP
from .batch import TOKENS_AT_ONCE, Residual
from .per_layer import PerLayerOps


class AltUpOps(PerLayerOps):
    """Part of CudaOps."""

    def altup_streams(self, x: Residual, matrices: Weight) -> Residual:
        columns = x.values.shape[1]
        made = self._by_all(self.cast(x), matrices)
        streams = self.work.array("streams", FLOAT32, ALTUP_STREAMS, self.n, columns)
        self._launch("altup_streams", x=x.values, y=made, columns=columns, streams=streams)
        return Residual(streams)

    def altup_predict(self, x: Residual, w: Weights) -> tuple[Residual, Residual]:
        columns, active = x.values.shape[2], self.work.array("active stream", FLOAT32, self.n, x.values.shape[2])
        self._launch(
            "altup_predict",
            streams=x.values,
            modalities=self._modalities(self._stream(x, 0), w),
            matrix=self.vector(w.altup_predict_coef),
            columns=columns,
            x=active,
        )
        return x, Residual(active)

    def altup_correct(self, x: Residual, made: Residual, w: Weights) -> Residual:
        columns = x.values.shape[2]
        first = self.work.array("corrected stream", FLOAT32, self.n, columns)
        self._launch(
            "altup_correct",
            streams=x.values,
            modalities=self._modalities(made.values, w),
            matrix=self.vector(w.altup_correct_coef),
            made=made.values,
            weight=self.vector(w.altup_correct_scale),
            columns=columns,
            first=first,
        )
        self._add_embeddings(x, first, w)
        return x

    def _add_embeddings(self, x: Residual, first: DeviceArray, w: Weights) -> None:
        """To all streams but the first, what the token's embedding for this layer gives."""
        sums, row_scale = self.gated_embedding(self.cast(first), w.inp_gate, w.proj)
        for number in range(1, ALTUP_STREAMS):
            stream = Residual(self._stream(x, number))
            self.add_rms_norm(stream, sums, w.post_norm, row_scale=row_scale)

    def altup_merge(self, x: Residual, matrices: Weight) -> Residual:
        columns = x.values.shape[2]
        merged = self.work.array("residual", FLOAT32, self.n, columns)
        for number in range(1, ALTUP_STREAMS):  # each is multiplied by all, of which one counts
            made = self._by_all(self.cast(self._stream(x, number)), matrices)
            self._launch("altup_merge", streams=x.values, y=made, third=number - 1, columns=columns, x=merged)
        return Residual(merged)

    def sparse(self, h: Operand, gate: Weight, up: Weight, down: Weight, sparsity: float) -> DeviceArray:
        """`mlp` with sparse gates (Ops.mlp), without a residual stream."""
        g, u, d = (self.matrix(weight) for weight in (gate, up, down))
        assert h.length is not None, "what a network gets comes from a norm"
        self.enter("linear", [gate, up, down], self.n)
        self.hear([gate, up], h)
        out = self.work.array("linear", FLOAT32, self.n, d.rows)
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            sums = self.work.array("sparse sums", FLOAT32, end - t, g.rows + u.rows)
            self.multiply(h.part(t, end), [g, u], sums)
            # A gate less its mean may be twice as large as any.
            scale = self.scales.divided(self.scales.of_outputs(g, h.length, None, u, None), 2.0)
            act = Operand(self.work.array("activated", HALVES.dtype, end - t, HALVES.padded(g.rows)), g.rows, scale)
            self.launcher.launch(
                ALTUP,
                "sparse_gates",
                grid=end - t,
                x=sums,
                columns=g.rows,
                sparsity=sparsity,
                scale=scale,
                out=act.values,
                stride=act.values.shape[1],
            )
            self.hear([down], act, t)
            self.multiply(act, [d], out.rows(t, end))
        return out

    def _stream(self, x: Residual, number: int) -> DeviceArray:
        """One of the streams, [T, H]."""
        _, n, columns = x.values.shape
        whole = x.values.rows(number, number + 1)
        return DeviceArray(whole.address, whole.dtype, (n, columns))

    def _by_all(self, a: Operand, stack: Weight) -> DeviceArray:
        """What all matrices of a stack make of an operand, side by side, float32 [T, matrices * rows]."""
        matrix = self.matrix(stack)
        made = self.work.array("stream sums", FLOAT32, self.n, matrix.rows)
        self.enter("linear", [stack], self.n)
        self.multiply(a, [matrix], made)
        self.enter("rest")
        return made

    def _modalities(self, x: DeviceArray, w: Weights) -> DeviceArray:
        """What the coefficients are made of, before the tanh: float32 [T, streams]."""
        h = self.normalise(x, w.altup_router_norm)
        self.enter("linear", [w.altup_router], self.n)
        self.hear([w.altup_router], h)
        made = self.work.array("modalities", FLOAT32, self.n, ALTUP_STREAMS)
        self.multiply(self.scaled(h, 1 / h.columns), [self.matrix(w.altup_router)], made)
        self.enter("rest")
        return made

    def _launch(self, kernel: str, **given: DeviceArray | int | None) -> None:
        """A kernel of altup.cu over the batch's tokens."""
        self.launcher.launch(ALTUP, kernel, grid=self.n, **given)
