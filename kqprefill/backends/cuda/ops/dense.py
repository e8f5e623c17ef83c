"""The residual stream, and dense matrices."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
import math

import numpy as np

from ....errors import ModelError
from ....models.weights import Weight
from ..device.arrays import FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..programs import ACTIVATIONS, NORM, weight_program
from ..weights.matrix import Matrix, matrix_of
from ..weights.staging import repack
from .batch import TOKENS_AT_ONCE, Residual, ResidualBound
from .norms import NormOps


class DenseOps(NormOps):
    """Part of CudaOps."""

    def embed(self, weight: Weight, scale: float = 1.0) -> Residual:
        self.enter("rest")
        columns = weight.shape[1]
        x = self.work.array("residual", FLOAT32, self.n, columns)
        residual = Residual(x, ResidualBound(weight, scale))
        weights = self.context.weights
        if not weights.on_host(weight):
            self._embed(weights.matrix(weight), self.tokens, scale, x)
            return residual
        numbers = self.row_numbers()
        for t in range(0, self.n, TOKENS_AT_ONCE):
            m = min(TOKENS_AT_ONCE, self.n - t)
            raw = weights.host_rows(weight, self.batch.tokens[t : t + m])
            self.embed_rows(weight, self.work.upload("embedding rows", raw), numbers, scale, x.rows(t, t + m))
        return residual

    def row_numbers(self) -> DeviceArray:
        """0, 1, 2, …: what `embed_rows` calls the rows that it is given. As many each time, so that the array stays
        where it is however many rows a caller has."""
        return self.work.keep("row numbers", np.arange(TOKENS_AT_ONCE, dtype=np.int32))

    def embed_rows(
        self, weight: Weight, raw: DeviceArray, numbers: DeviceArray, scale: float, out: DeviceArray
    ) -> None:
        """out = scale * rows of a matrix, which are given as the file has them: uint8 [rows, row bytes]."""
        m = raw.shape[0]
        rows = replace(matrix_of(weight.tensor), rows=m)
        held = self.work.array("embedding", rows.array.dtype, *rows.array.shape)
        rows = replace(rows, address=held.address)
        repack(self.launcher, rows, 0, raw)
        self._embed(rows, numbers.rows(0, m), scale, out)

    def _embed(self, matrix: Matrix, tokens: DeviceArray, scale: float, out: DeviceArray) -> None:
        self.launcher.launch(
            weight_program(matrix.type),
            "embed",
            grid=out.shape[0],
            weights=matrix.array,
            units=matrix.units,
            columns=matrix.columns,
            tokens=tokens,
            factor=scale,
            out=out,
        )

    def cast(self, x: Residual | DeviceArray) -> Operand:
        self.enter("rest")
        if isinstance(x, DeviceArray):
            return self._cast_rows(x)
        columns = x.values.shape[1]
        largest = self._largest(x.bound)
        out = Operand(
            self.work.array("normed", HALVES.dtype, self.n, HALVES.padded(columns)),
            columns,
            self.scales.of_bound(largest),
            None,
            math.sqrt(columns) * largest,
        )
        self._cast(x.values, out.values, out.scale)
        return out

    def _cast_rows(self, x: DeviceArray) -> Operand:
        """Float32 rows of which no bound is known, each by its own largest value."""
        rows, columns = x.shape
        values = self.work.array("cast rows", HALVES.dtype, rows, HALVES.padded(columns))
        row_scale = self.work.array("row scales", FLOAT32, rows)
        self.launcher.launch(
            ACTIVATIONS,
            "cast_rows",
            grid=rows,
            x=x,
            columns=columns,
            out=values,
            stride=values.shape[1],
            row_scale=row_scale,
        )
        return Operand(values, columns, self.scales.unit(), row_scale=row_scale)

    def projected(self, a: Operand, weight: Weight) -> Operand:
        return self.project(a, weight, "projected")

    def project(self, a: Operand, weight: Weight, name: str) -> Operand:
        """As `projected`, in the work array of that name."""
        assert a.length is not None, "what is projected comes from a norm or a cast"
        self.hear([weight], a)
        self.enter("linear", [weight], self.n)
        matrix, bias = self.matrix(weight), self.bias(weight)
        sums = self.work.array("projected sums", FLOAT32, self.n, matrix.rows)
        self.multiply(a, [matrix], sums, bias)
        self.enter("rest")
        scale = self.scales.of_outputs(matrix, a.length, bias)
        values = self.work.array(name, HALVES.dtype, self.n, HALVES.padded(matrix.rows))
        self._cast(sums, values, scale)
        return Operand(values, matrix.rows, scale)

    def _cast(self, x: DeviceArray, out: DeviceArray, scale: DeviceArray) -> None:
        """Rows of floats to those of an operand."""
        rows, columns = x.shape
        self.launcher.launch(NORM, "cast", grid=rows, x=x, out=out, columns=columns, stride=out.shape[1], scale=scale)

    def _largest(self, bound: ResidualBound | None) -> float:
        """No value of the residual stream is larger."""
        if bound is None:
            raise ModelError(
                f"{self.config.architecture}: this family's page casts a residual stream that more than norms' outputs "
                "were added to: nothing bounds its values"
            )
        weights, embedding = self.context.weights, bound.embedding
        on_host = weights.on_host(embedding)
        largest = weights.absmax(embedding) if on_host else self.scales.absmax(weights.matrix(embedding))
        return abs(bound.scale) * largest + bound.added

    def linear(
        self, a: Operand, weight: Weight, residual: Residual | None = None, scale: float = 1.0
    ) -> DeviceArray | Residual:
        self.hear([weight], a)
        return self.linear_unheard(a, weight, residual, scale)

    def linear_unheard(
        self, a: Operand, weight: Weight, residual: Residual | None = None, scale: float = 1.0
    ) -> DeviceArray | Residual:
        """As `linear`, of an input that the collector hears of elsewhere."""
        self.enter("linear", [weight], self.n)
        matrix, (a, residual) = self.matrix(weight), self.own(a, residual)
        if a.row_scale is not None and residual is not None:
            return self._add_rows(a, matrix, self.bias(weight), residual, scale)
        assert a.row_scale is None, "rows with scales of their own are added to the residual stream"
        out = self._sums(residual, matrix)
        self.multiply(self.scaled(a, scale), [matrix], out, self.bias(weight), add=residual is not None)
        return out if residual is None else Residual(out)

    def _add_rows(
        self, a: Operand, matrix: Matrix, bias: DeviceArray | None, residual: Residual, scale: float
    ) -> Residual:
        """The residual stream and scale times a product of rows that have scales of their own."""
        sums = self.work.array("linear", FLOAT32, self.n, matrix.rows)
        self.multiply(a, [matrix], sums)
        self.enter("rest")
        self.launcher.launch(
            ACTIVATIONS,
            "add_rows",
            grid=self.n,
            x=residual.values,
            y=sums,
            row_scale=a.row_scale,
            bias=bias,
            columns=matrix.rows,
            factor=scale,
        )
        return Residual(residual.values)

    def mlp(
        self,
        h: Operand,
        gate: Weight | None,
        up: Weight,
        down: Weight,
        *,
        activation: str,
        residual: Residual | None = None,
        scale: float = 1.0,
        sparsity: float | None = None,
    ) -> DeviceArray | Residual:
        h, residual = self.own(h, residual)
        if gate is None:
            return self._ungated(h, up, down, activation, residual, scale)
        if sparsity is not None:
            assert residual is None and activation == "gelu_tanh", "sparse gates as Gemma 3n's"
            return self.sparse(h, gate, up, down, sparsity)
        self.enter("linear", [gate, up, down], self.n)
        self.hear([gate, up], h)
        g, u, d = (self.matrix(weight) for weight in (gate, up, down))
        biases = self.bias(gate), self.bias(up)
        out = self._sums(residual, d)
        weight_scale = self.scales.of_weights([g, u], h.norm)
        act_scale = self.gated_scale(activation, h, g, u, biases)
        gemm = self.context.gemms.choose([g, u])
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            values = self.work.array("activated", HALVES.dtype, end - t, HALVES.padded(g.rows))
            act = Operand(values, g.rows, act_scale)
            gemm.gated(h.part(t, end), g, u, act, weight_scale, biases, activation)
            self.hear([down], act, t)
            self.multiply(self.scaled(act, scale), [d], out.rows(t, end), self.bias(down), add=residual is not None)
        return out if residual is None else Residual(out)

    @abstractmethod
    def sparse(self, h: Operand, gate: Weight, up: Weight, down: Weight, sparsity: float) -> DeviceArray:
        """As `mlp`, with sparse gates, without a residual stream."""

    def _ungated(
        self, h: Operand, up: Weight, down: Weight, activation: str, residual: Residual | None, scale: float
    ) -> DeviceArray | Residual:
        """As `mlp`, without a gate."""
        assert h.length is not None, "what a network gets comes from a norm or a cast"
        self.enter("linear", [up, down], self.n)
        self.hear([up], h)
        u, d, bias = self.matrix(up), self.matrix(down), self.bias(up)
        out = self._sums(residual, d)
        weight_scale = self.scales.of_weights([u], h.norm)
        act_scale = self.activated_scale(activation, self.scales.of_outputs(u, h.length, bias))
        gemm = self.context.gemms.choose([u])
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            values = self.work.array("activated", HALVES.dtype, end - t, HALVES.padded(u.rows))
            act = Operand(values, u.rows, act_scale)
            gemm.activated(h.part(t, end), u, act, weight_scale, bias, activation)
            self.hear([down], act, t)
            self.multiply(self.scaled(act, scale), [d], out.rows(t, end), self.bias(down), add=residual is not None)
        return out if residual is None else Residual(out)

    def activated_scale(self, activation: str, scale: DeviceArray) -> DeviceArray:
        """The scale of act(x), of values x that are scaled by *scale: GELU makes none larger."""
        return self.scales.squared(scale) if activation == "relu_squared" else scale

    def _sums(self, residual: Residual | None, matrix: Matrix) -> DeviceArray:
        """Where a matrix's sums go: into the residual stream, or to an array of their own."""
        return residual.values if residual is not None else self.work.array("linear", FLOAT32, self.n, matrix.rows)

    def gated_scale(
        self,
        activation: str,
        h: Operand,
        gate: Matrix,
        up: Matrix,
        biases: tuple[DeviceArray | None, DeviceArray | None],
    ) -> DeviceArray:
        """The scale of act(gate) * up."""
        if activation == "swiglu_oai":  # clamped: at most 7 * (7 + 1)
            return self.scales.of_bound(56.0)
        assert h.length is not None, "what is gated comes from a norm or a cast"
        return self.scales.of_outputs(gate, h.length, biases[0], up, biases[1])
