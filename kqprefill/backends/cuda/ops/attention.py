"""Queries, keys and values, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from ....gguf import ModelTensor
from ....models.config import Rope
from ....models.weights import Weight
from ..constants import THREADS
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..programs import GATES, NORM, ROPE
from ..weights.matrix import Matrix
from .batch import TOKENS_AT_ONCE, BatchOps

_ROTATION_GROWTH = 1.5  # rotating a pair lengthens neither, but may turn it onto one axis: sqrt(2), rounded up
_HEADS_A_BLOCK = THREADS["rotate_qkv"] // 32  # of rotate_qkv: a warp has one
_COPY_BYTES = 16  # that a thread of copy_rows copies at a time


@dataclass(frozen=True)
class Heads:
    """q, k or v: halves [rows, heads, head_dim padded to 16], holding values times *scale."""

    values: DeviceArray
    scale: DeviceArray

    @property
    def matrix(self) -> DeviceArray:
        """The values as [rows, heads * padded head_dim]."""
        rows, heads, dim = self.values.shape
        return DeviceArray(self.values.address, self.values.dtype, (rows, heads * dim))


class AttentionOps(BatchOps):
    """Part of CudaOps."""

    def qkv(
        self,
        h: Operand,
        wq: Weight,
        wk: Weight,
        wv: Weight,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
    ) -> tuple[Heads, Heads, Heads]:
        q, k, v, _ = self._qkv(h, (wq, wk, wv), rope, q_norm, k_norm, gated=False)
        return q, k, v

    def gated_qkv(
        self,
        h: Operand,
        wq: Weight,
        wk: Weight,
        wv: Weight,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
    ) -> tuple[Heads, Heads, Heads, DeviceArray | None]:
        return self._qkv(h, (wq, wk, wv), rope, q_norm, k_norm, gated=True)

    def _qkv(
        self,
        h: Operand,
        weights: tuple[Weight, Weight, Weight],
        rope: Rope | None,
        q_norm: Weight | None,
        k_norm: Weight | None,
        gated: bool,
    ) -> tuple[Heads, Heads, Heads, DeviceArray | None]:
        c = self.config
        matrices = [self.matrix(w) for w in weights]
        width = c.q_width * (2 if gated else 1) + 2 * c.kv_width
        bias = None
        if any(w.bias is not None for w in weights):
            bias, _ = self.context.small.vector(*(w.bias or m.rows for w, m in zip(weights, matrices)))
        sums = self.work.array("qkv", FLOAT32, min(self.n, TOKENS_AT_ONCE), width)
        q = self.work.array("q", FLOAT16, self.n, c.head_count, self.attention_config.head_dim)
        gates = self.work.array("gates", HALVES.dtype, self.n, HALVES.padded(c.q_width)) if gated else None
        k, v = self.states.keys_values(self.layer)
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            self.enter("linear", weights, end - t)
            self.multiply(h.part(t, end), matrices, sums.rows(0, end - t), bias)
            self.enter("rest")
            for norm, column in ((q_norm, 0), (k_norm, c.q_width)):
                if norm is not None and norm.shape != (c.head_dim,):
                    self._normalise_all_heads(sums.rows(0, end - t).columns(column), norm, width)
            scales = self._rotated_scales(h, matrices, weights, q_norm, k_norm, rope)
            self._rotate(sums, t, end, (q, k, v), scales, q_norm, k_norm, rope, gated)
            if gates is not None:
                self._store_gates(sums.rows(0, end - t), gates.rows(t, end))
        if self.key_copies is not None:
            chunks = k.row_bytes // _COPY_BYTES
            copies = self.key_copies
            self.launcher.launch(ROPE, "copy_rows", grid=copies.shape[0], k=k, v=v, chunks=chunks, copies=copies)
        return Heads(q, scales[0]), Heads(k, scales[1]), Heads(v, scales[2]), gates

    def _store_gates(self, sums: DeviceArray, gates: DeviceArray) -> None:
        self.launcher.launch(
            GATES,
            "store_gates",
            grid=sums.shape[0],
            qkv=sums,
            row=sums.shape[1],
            heads=self.config.head_count,
            head_dim=self.config.head_dim,
            gates=gates,
            stride=gates.shape[1],
        )

    def gated(self, a: Operand, gate: DeviceArray) -> Operand:
        self.launcher.launch(
            GATES,
            "multiply_gates",
            grid=a.rows,
            a=a.values,
            gates=gate,
            columns=a.columns,
            stride=a.values.shape[1],
        )
        return a

    def _normalise_all_heads(self, sums: DeviceArray, norm: Weight, stride: int) -> None:
        self.launcher.launch(
            NORM,
            "rms_norm_in_place",
            grid=sums.shape[0],
            x=sums,
            weight=self.vector(norm),
            columns=norm.shape[0],
            stride=stride,
            epsilon=self.config.rms_epsilon,
        )

    def _rotate(
        self,
        sums: DeviceArray,
        t: int,
        end: int,
        to: tuple[DeviceArray, DeviceArray, DeviceArray],
        scales: list[DeviceArray],
        q_norm: Weight | None,
        k_norm: Weight | None,
        rope: Rope | None,
        gated: bool,
    ) -> None:
        """From the sums of tokens t to end - 1 to their heads, normalised, rotated and scaled."""
        c, (q, k, v) = self.config, to
        pairs = rope.width // 2 if rope is not None else 0
        # Where rows of k and v are in another order than the tokens, the kernel looks them up.
        first_key = 0 if self.key_row_of is not None else self.batch.start * (self.cache is not None) + t
        by_head = [norm if norm is not None and norm.shape == (c.head_dim,) else None for norm in (q_norm, k_norm)]
        heads = c.head_count + 2 * c.head_count_kv
        self.launcher.launch(
            ROPE,
            "rotate_qkv",
            grid=(end - t, -(-heads // _HEADS_A_BLOCK)),
            qkv=sums,
            q=q.rows(t),
            k=k.rows(first_key),
            v=v.rows(first_key),
            nq=c.head_count,
            nkv=c.head_count_kv,
            head_dim=c.head_dim,
            padded=self.attention_config.head_dim,
            q_norm=self.vector(by_head[0]),
            k_norm=self.vector(by_head[1]),
            epsilon=c.rms_epsilon,
            table=self._rope_table(rope).rows(t) if rope is not None and pairs else None,
            pairs=pairs,
            interleaved=int(rope is not None and pairs > 0 and rope.interleaved),
            q_scale=scales[0],
            k_scale=scales[1],
            v_scale=scales[2],
            kv_rows=self.key_row_of.rows(t) if self.key_row_of is not None else None,
            positions=self.positions.rows(t),
            beta=rope.beta if rope is not None and pairs else 0.0,
            beta_length=rope.beta_length if rope is not None and pairs else 1,
            gated=int(gated),
        )

    def _rotated_scales(
        self,
        h: Operand,
        matrices: list[Matrix],
        weights: tuple[Weight, Weight, Weight],
        q_norm: Weight | None,
        k_norm: Weight | None,
        rope: Rope | None,
    ) -> list[DeviceArray]:
        """The scales of q, k and v, once their matrices have been measured."""
        growth = _ROTATION_GROWTH * rope.magnitude if rope is not None else 1.0
        hottest = float(rope.temperature(np.array(self.config.context_length))) if rope is not None else 1.0
        growths = growth * hottest, growth, 1.0
        norms = q_norm, k_norm, None
        return [
            self._rotated_scale(h, matrix, weight.bias, norm, growth)
            for matrix, weight, norm, growth in zip(matrices, weights, norms, growths)
        ]

    def _rotated_scale(
        self, h: Operand, matrix: Matrix, bias: ModelTensor | None, norm: Weight | None, growth: float
    ) -> DeviceArray:
        """Of q, k or v, which may grow by a factor: bounded by its norm where it has one, else by its matrix's rows."""
        if norm is not None:
            _, host = self.context.small.vector(norm.tensor)
            return self.scales.of_bound(math.sqrt(len(host)) * float(np.abs(host).max()) * growth)
        assert h.length is not None, "what q, k and v are made of comes from a norm or a cast"
        vector = self.context.small.vector(bias)[0] if bias is not None else None
        return self.scales.of_outputs(matrix, growth * h.length, vector)

    def _rope_table(self, rope: Rope) -> DeviceArray:
        """(cos, sin) of each token's angles, float32 [T, 2 * pairs]; made once a batch."""
        if id(rope) not in self.rope_tables:
            pairs = rope.width // 2
            table = self.work.array(f"rope {len(self.rope_tables)}", FLOAT32, self.n, 2 * pairs)
            self.launcher.launch(
                ROPE,
                "rope_table",
                grid=-(-self.n * pairs // THREADS["rope_table"]),
                positions=self.positions,
                half_turns=self.context.small.constant(rope.inv_freq / math.pi),
                n=self.n,
                pairs=pairs,
                magnitude=rope.magnitude,
                table=table,
            )
            self.rope_tables[id(rope)] = table
        return self.rope_tables[id(rope)]

    def attention(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Weight | None = None,
    ) -> Operand:
        self.enter_attention(window)
        c, config = self.config, self.attention_config
        out = self.work.array("attended", HALVES.dtype, self.n, HALVES.padded(c.q_width))
        inputs: dict[str, DeviceArray] = {"q": q.values, "k": k.values, "v": v.values}
        if config.uses_tensor_maps:
            rows = config.block_q, config.block_kv, config.block_kv
            inputs = {
                f"{name}_map": self.context.maps.of(heads.matrix, box_rows)
                for name, heads, box_rows in zip("qkv", (q, k, v), rows)
            }
        self.launcher.launch(
            config.program,
            "attention",
            grid=(c.head_count, self.query_tiles.shape[0]),
            **inputs,
            out=out,
            tiles=self.query_tiles,
            nq=c.head_count,
            nkv=c.head_count_kv,
            head_dim=c.head_dim,
            out_stride=out.shape[1],
            scale=scale,
            q_scale=q.scale,
            k_scale=k.scale,
            window=window or 0,
            softcap=softcap or 0.0,
            sinks=self.vector(sinks),
        )
        return Operand(out, c.q_width, v.scale)
