"""Embeddings of each token for each layer, of Gemma 4's small models (kernels/per_layer.cu)."""

from __future__ import annotations

import math

from ....models.family import Family
from ....models.weights import Weight
from ..constants import THREADS
from ..device.arrays import FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..programs import ALTUP, PER_LAYER
from .batch import Residual
from .dense import DenseOps

_TOKENS = 2048  # whose rows of the table are decoded at a time
_WARPS = THREADS["join_embeddings"] // 32


class PerLayerOps(DenseOps):
    """Part of CudaOps."""

    def begin_batch(self, family: Family) -> None:
        super().begin_batch(family)
        self._table: Weight | None = family.row_table()
        self._table_rows: DeviceArray | None = None
        if self._table is not None:
            self._row_numbers = self.row_numbers()

    def begin_tokens(self) -> None:
        super().begin_tokens()
        if self._table is not None:  # far too large for the device: the rows of the batch's tokens come from the file
            raw = self.context.weights.host_rows(self._table, self.batch.tokens)
            self._table_rows = self.work.upload("rows for the layers", raw)

    def embed_for_layers(self, x: Residual, table: Weight, matrix: Weight, norm: Weight) -> None:
        assert self._table_rows is not None, "the family's row_table is this table"
        (width,), columns = norm.shape, table.shape[1]
        h = self.scaled(self.cast(x), 1 / math.sqrt(x.values.shape[1]))
        self._embeddings = self.work.array("embeddings for the layers", FLOAT32, self.n, columns)
        self.enter("linear", [matrix], self.n)
        self.multiply(h, [self.matrix(matrix)], self._embeddings)
        self.enter("rest")
        layers = columns // width
        for t in range(0, self.n, _TOKENS):
            end = min(t + _TOKENS, self.n)
            own = self.work.array("of the table", FLOAT32, end - t, columns)
            self.embed_rows(table, self._table_rows.rows(t, end), self._row_numbers, math.sqrt(width), own)
            self.launcher.launch(
                PER_LAYER,
                "join_embeddings",
                grid=(end - t, -(-layers // _WARPS)),
                embeddings=self._embeddings.rows(t, end),
                own=own,
                norm=self.vector(norm),
                layers=layers,
                width=width,
                epsilon=self.config.norm_epsilon,
            )

    def add_gated_embedding(
        self, x: Residual, gate: Weight, matrix: Weight, norm: Weight, factor: Weight | None
    ) -> Residual:
        sums, row_scale = self.gated_embedding(self.cast(x), gate, matrix)
        return self.add_rms_norm(x, sums, norm, factor, row_scale)

    def gated_embedding(self, h: Operand, gate: Weight, matrix: Weight) -> tuple[DeviceArray, DeviceArray]:
        """matrix (gelu(gate h) * e), float32 [T, H], where e are the tokens' embeddings for this layer; and the powers
        of two that its rows are still to be multiplied by, float32 [T]."""
        width = gate.shape[0]
        gates = self.work.array("embedding gates", FLOAT32, self.n, width)
        self.enter("linear", [gate], self.n)
        self.hear([gate], h)
        self.multiply(h, [self.matrix(gate)], gates)
        if h.row_scale is not None:
            self.launcher.launch(ALTUP, "scale_rows", grid=self.n, x=gates, row_scale=h.row_scale, columns=width)
        values = self.work.array("gated embedding", HALVES.dtype, self.n, HALVES.padded(width))
        row_scale = self.work.array("row scales", FLOAT32, self.n)
        self.launcher.launch(
            PER_LAYER,
            "gate_embeddings",
            grid=-(-self.n // _WARPS),
            gates=gates,
            embeddings=self._embeddings.columns(self.layer * width),
            apart=self._embeddings.shape[1],
            n=self.n,
            width=width,
            out=values,
            stride=values.shape[1],
            row_scale=row_scale,
        )
        gated = Operand(values, width, self.scales.unit(), row_scale=row_scale)
        self.hear([matrix], gated)
        self.enter("linear", [matrix], self.n)
        sums = self.work.array("linear", FLOAT32, self.n, matrix.shape[0])
        self.multiply(gated, [self.matrix(matrix)], sums)
        return sums, row_scale
