"""Queries, keys and values, and attention over them."""

from __future__ import annotations

from dataclasses import replace
import math
from typing import Any

import numpy as np

from ....core import SharedKeysValues
from ....gguf import ModelTensor
from ....models.config import Rope
from ....models.family import Family
from ....models.weights import Weight
from ..constants import THREADS
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..device.launcher import begun_early
from ..gemm.heads import HeadsKind, HeadsOutput
from ..gemm.operand import HALVES, Operand
from ..programs import GATES, NORM, ROPE
from ..weights.matrix import Matrix
from .batch import TOKENS_AT_ONCE, Attending, BatchOps
from .heads import HeadProducts, Heads

ROTATION_GROWTH = 1.5  # rotating a pair lengthens neither, but may turn it onto one axis: sqrt(2), rounded up
_HEADS_A_BLOCK = THREADS["rotate_qkv"] // 32  # of rotate_qkv: a warp has one
_COPY_BYTES = 16  # that a thread of copy_rows copies at a time


class AttentionOps(BatchOps):
    """Part of CudaOps."""

    def begin_batch(self, family: Family) -> None:
        super().begin_batch(family)
        self._layer_states = family.layer_states
        self._keys_values: dict[int, tuple[Heads, Heads]] = {}  # of the layers that have been through

    def qkv(
        self,
        h: Operand,
        wq: Weight,
        wk: Weight | None,
        wv: Weight | None,
        *,
        rope: Rope | None,
        q_norm: Weight | None = None,
        k_norm: Weight | None = None,
        v_normed: bool = False,
        normed_last: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        head_dim = wq.shape[0] // self.config.head_count
        products = self._products((wq, wk, wv), head_dim, rope, q_norm, k_norm, v_normed)
        q, _ = self._heads(h, replace(products, normed_last=normed_last))
        return q, *self._layer_keys_values()

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
        head_dim = wq.shape[0] // self.config.head_count // 2
        products = self._products((wq, wk, wv), head_dim, rope, q_norm, k_norm, gated=True)
        q, gates = self._heads(h, products)
        return q, *self._layer_keys_values(), gates

    def _products(
        self,
        weights: tuple[Weight, Weight | None, Weight | None],
        head_dim: int,
        rope: Rope | None,
        q_norm: Weight | None,
        k_norm: Weight | None,
        v_normed: bool = False,
        gated: bool = False,
    ) -> HeadProducts:
        _, wk, wv = weights
        nkv = wk.shape[0] // head_dim if wk is not None else 0
        own = [weight for weight in weights if weight is not None]
        nq, v_is_k = self.config.head_count, wk is not None and wv is None
        return HeadProducts(own, nq, nkv, head_dim, gated, v_is_k, q_norm, k_norm, v_normed, rope)

    def _layer_keys_values(self) -> tuple[Heads, Heads]:
        """Those that the layer sees, its own or an earlier layer's."""
        state = self._layer_states[self.layer]
        return self._keys_values[state.layer if isinstance(state, SharedKeysValues) else self.layer]

    def _heads(self, h: Operand, products: HeadProducts) -> tuple[Heads, DeviceArray | None]:
        """q, and the gates; k and v, where the layer has its own, go to where they are kept."""
        p, weights = products, products.weights
        attending = self.attending(p.head_dim, p.head_dim)
        self.hear(weights, h)
        q = self.work.array("q", FLOAT16, self.n, p.nq, attending.config.head_dim)
        gates = self.work.array("gates", HALVES.dtype, self.n, HALVES.padded(p.q_width)) if p.gated else None
        k, v = self.states.keys_values(self.layer) if p.nkv else (None, None)
        scales: list[DeviceArray] = []
        for t in range(0, self.n, TOKENS_AT_ONCE):
            end = min(t + TOKENS_AT_ONCE, self.n)
            scales = self._make_heads(h.part(t, end), t, (q, k, v), gates, p, attending)
        if k is not None and v is not None:
            if attending.key_copies is not None:
                self._copy_rows(k, v, attending.key_copies)
            self.states.note_scales(self.layer, *scales[1:])
            self._keys_values[self.layer] = Heads(k, scales[1], p.head_dim), Heads(v, scales[2], p.head_dim)
        return Heads(q, scales[0], p.head_dim), gates

    def _make_heads(
        self,
        h: Operand,
        t: int,
        to: tuple[DeviceArray, DeviceArray | None, DeviceArray | None],
        gates: DeviceArray | None,
        products: HeadProducts,
        attending: Attending,
    ) -> list[DeviceArray]:
        """Multiply the rows of h, tokens from number t on, and make heads of the sums; the scales of q, k and v."""
        p, weights = products, products.weights
        matrices = [self.matrix(w) for w in weights]
        width = sum(matrix.rows for matrix in matrices)
        bias = None
        if any(w.bias is not None for w in weights):
            bias, _ = self.context.small.vector(*(w.bias or m.rows for w, m in zip(weights, matrices)))
        # Also where the GEMM makes the heads: batches of fewer tokens may need them, and take no more memory.
        sums = self.work.array("qkv", FLOAT32, min(self.n, TOKENS_AT_ONCE), width).rows(0, h.rows)
        self.enter("linear", weights, h.rows)
        weight_scale = self.scales.of_weights(matrices, h.norm)
        scales = self._rotated_scales(h, matrices, p)
        if p.kind is not None:
            output = self._heads_output(p.kind, t, to, scales, p, attending)
            if self.context.gemms.choose(matrices).heads(h, matrices, output, weight_scale, bias):
                return scales
        self.multiply(h, matrices, sums, bias)
        self.enter("rest")
        for norm, column in ((p.q_norm, 0), (p.k_norm, p.q_width)):
            if norm is not None and len(norm.shape) == 1 and norm.shape != (p.head_dim,):
                self._normalise_all_heads(sums.columns(column), norm, width)
        self._rotate(sums, t, to, scales, p, attending, matrices[0].int8)
        if gates is not None:
            self._store_gates(sums, gates.rows(t, t + h.rows), p)
        return scales

    def _copy_rows(self, k: DeviceArray, v: DeviceArray, copies: DeviceArray) -> None:
        self.launcher.launch(
            ROPE,
            "copy_rows",
            grid=copies.shape[0],
            k=k,
            v=v,
            k_chunks=k.row_bytes // _COPY_BYTES,
            v_chunks=v.row_bytes // _COPY_BYTES,
            copies=copies,
        )

    def _store_gates(self, sums: DeviceArray, gates: DeviceArray, products: HeadProducts) -> None:
        self.launcher.launch(
            GATES,
            "store_gates",
            grid=sums.shape[0],
            qkv=sums,
            row=sums.shape[1],
            heads=products.nq,
            head_dim=products.head_dim,
            gates=gates,
            stride=gates.shape[1],
        )

    def gated(self, a: Operand, gate: DeviceArray) -> Operand:
        self.launcher.launch(
            GATES,
            "multiply_gates",
            grid=a.rows,
            a=a.values,
            gates=gate.rows(gate.shape[0] - a.rows),
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
            epsilon=self.config.norm_epsilon,
        )

    def _rotate(
        self,
        sums: DeviceArray,
        t: int,
        to: tuple[DeviceArray, DeviceArray | None, DeviceArray | None],
        scales: list[DeviceArray],
        products: HeadProducts,
        attending: Attending,
        int8: bool,
    ) -> None:
        """From the sums of tokens from number t on to their heads, normalised, rotated and scaled. int8: how q's sums
        were made."""
        p, rope = products, products.rope
        pairs = rope.width // 2 if rope is not None else 0
        given: dict[str, Any] = {
            "grid": (sums.shape[0], -(-(p.nq + 2 * p.nkv) // _HEADS_A_BLOCK)),
            "qkv": sums,
            "nq": p.nq,
            "nkv": p.nkv,
            "head_dim": p.head_dim,
            "padded": attending.config.head_dim,
            "epsilon": self.config.norm_epsilon,
            **self._tokens_from(t, to, scales, p, attending),
            "pairs": pairs,
            "interleaved": int(rope is not None and pairs > 0 and rope.interleaved),
            "positions": self.positions.rows(t),
            "beta": rope.beta if rope is not None else 0.0,
            "beta_length": rope.beta_length if rope is not None else 1,
        }
        if p.is_usual:
            given |= {"q_norm": self.vector(p.by_head[0]), "k_norm": self.vector(p.by_head[1])}
            given |= {"v_normed": int(p.v_normed), "gated": int(p.gated), "v_is_k": int(p.v_is_k)}
            given |= {"int8": int(int8)}
            with begun_early(self.launcher):
                self.launcher.launch(ROPE, "rotate_qkv", **given)
            return
        assert not (p.gated or p.v_is_k or p.v_normed), "heads of two unusual kinds"
        is_normed = p.normed_last or p.q_norm is not None
        self.launcher.launch(
            ROPE,
            "rotate_and_norm",
            q_norm=self.vector(p.q_norm),
            k_norm=self.vector(p.k_norm),
            norm_step=p.head_dim if p.q_norm is not None and len(p.q_norm.shape) == 2 else 0,
            normed=2 if p.normed_last else int(is_normed),
            centred=int(self.config.layer_norm),
            beta_offset=rope.beta_offset if rope is not None else 0,
            **given,
        )

    def _tokens_from(
        self,
        t: int,
        to: tuple[DeviceArray, DeviceArray | None, DeviceArray | None],
        scales: list[DeviceArray],
        products: HeadProducts,
        attending: Attending,
    ) -> dict[str, Any]:
        """Where heads of tokens from number t on go, and what they are made with."""
        (q, k, v), rope, row_of = to, products.rope, attending.key_row_of
        # Where rows of k and v are in another order than the tokens, the kernel looks them up.
        first_key = 0 if row_of is not None else self.batch.start * (self.cache is not None) + t
        return {
            "q": q.rows(t),
            "k": k.rows(first_key) if k is not None else None,
            "v": v.rows(first_key) if v is not None else None,
            "table": self._rope_table(rope).rows(t) if rope is not None and rope.width // 2 else None,
            "q_scale": scales[0],
            "k_scale": scales[1],
            "v_scale": scales[2],
            "kv_rows": row_of.rows(t) if row_of is not None else None,
        }

    def _heads_output(
        self,
        kind: HeadsKind,
        t: int,
        to: tuple[DeviceArray, DeviceArray | None, DeviceArray | None],
        scales: list[DeviceArray],
        products: HeadProducts,
        attending: Attending,
    ) -> HeadsOutput:
        """As `_rotate`, by the GEMM itself."""
        assert attending.config.head_dim == products.head_dim, "heads of 64 and 128 are not padded"
        return HeadsOutput(
            kind,
            nq=products.nq,
            nkv=products.nkv,
            q_norm=self.vector(products.q_norm),
            k_norm=self.vector(products.k_norm),
            epsilon=self.config.norm_epsilon,
            **self._tokens_from(t, to, scales, products, attending),
        )

    def _rotated_scales(self, h: Operand, matrices: list[Matrix], products: HeadProducts) -> list[DeviceArray]:
        """The scales of q, k and v, once their matrices have been measured. Where there are queries only, q's alone
        counts."""
        p, rope = products, products.rope
        growth = ROTATION_GROWTH * rope.magnitude if rope is not None else 1.0
        hottest = float(rope.temperature(np.array(self.config.context_length))) if rope is not None else 1.0
        if p.normed_last and p.q_norm is None:
            longest = math.sqrt(p.head_dim)
            q, k = self.scales.of_bound(longest * hottest), self.scales.of_bound(longest)
            return [q, k, self._rotated_scale(h, matrices[2], p.weights[2].bias, None, 1.0)]
        q = self._rotated_scale(h, matrices[0], p.weights[0].bias, p.q_norm, growth * hottest)
        if not p.nkv:
            return [q] * 3
        k = self._rotated_scale(h, matrices[1], p.weights[1].bias, p.k_norm, growth)
        if p.v_normed:
            return [q, k, self.scales.of_bound(math.sqrt(p.head_dim))]
        assert not p.v_is_k, "keys are values only once normalised"
        return [q, k, self._rotated_scale(h, matrices[2], p.weights[2].bias, None, 1.0)]

    def _rotated_scale(
        self, h: Operand, matrix: Matrix, bias: ModelTensor | None, norm: Weight | None, growth: float
    ) -> DeviceArray:
        """Of q, k or v, which may grow by a factor: bounded by its norm where it has one, else by its matrix's rows."""
        if norm is not None:
            _, host = self.context.small.vector(norm.tensor)
            return self.scales.of_bound(math.sqrt(host.shape[-1]) * float(np.abs(host).max()) * growth)
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
        chunked: bool = False,
        softcap: float | None = None,
        sinks: Weight | None = None,
        both_ways: bool = False,
    ) -> Operand:
        alone = self.leaves_one and not chunked and not both_ways
        self.enter_attention(q.head_dim, v.head_dim, window, alone)
        attending = self.attending(q.head_dim, v.head_dim)
        config, nq, columns = attending.config, self.config.head_count, self.config.head_count * v.head_dim
        out = self.work.array("attended", HALVES.dtype, self.n, HALVES.padded(columns))
        tiles = attending.query_tiles
        if chunked:
            assert attending.chunk_tiles is not None, "the family says how long a chunk is"
            tiles, window = attending.chunk_tiles, None
        if alone:
            tiles = tiles.rows(0, 1)  # the one with most keys
        inputs: dict[str, DeviceArray] = {"q": q.values, "k": k.values, "v": v.values}
        nkv = k.values.shape[1]
        sharers = config.sharers(nq, nkv, tiles.shape[0], self.context.gpu.multiprocessors)
        if config.uses_tensor_maps:
            own = config.block_kv // sharers
            rows = config.block_q, own, own
            inputs = {
                f"{name}_map": self.context.maps.of(heads.matrix, box_rows)
                for name, heads, box_rows in zip("qkv", (q, k, v), rows)
            }
        with begun_early(self.launcher):
            self.launcher.launch(
                config.program(both_ways, sharers),
                "attention",
                grid=(nq, tiles.shape[0], config.parts),
                **inputs,
                out=out,
                tiles=tiles,
                nq=nq,
                nkv=nkv,
                value_dim=v.head_dim,
                out_stride=out.shape[1],
                scale=scale,
                q_scale=q.scale,
                k_scale=k.scale,
                window=window or 0,
                softcap=softcap or 0.0,
                sinks=self.vector(sinks),
            )
        seen = Operand(out, columns, v.scale)
        if alone:
            self.n = 1
        return self.operand(seen)
