"""Multi-head latent attention (arXiv 2405.04434): kernels/latent.cu makes every head's keys and values of the latent
rows of the whole sequence so far, and the kernels of ordinary attention attend to them.

The other way is attention on the latent rows themselves, with the matrices of keys and values applied to queries and
outputs ("absorbed"). It makes no keys, but each pair of a query and a key takes 2 * heads * (2 * rank + rotary)
operations instead of 2 * heads * (head_dim + value_dim): 34.8 thousand instead of 10.2 thousand in DeepSeek-V2-Lite,
where making a key and a value takes 4.2 million. So it would win in batches of fewer than some 170 tokens only, and a
choice by the batch's length would make a prompt's bits depend on how it is cut. Keys and values are always made of the
halves that a cache would keep, for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
import math

import numpy as np

from ....core import Latent
from ....gguf.types import GGML
from ....models.config import Rope
from ....models.family import Family
from ....models.latent import LatentAttention
from ....models.weights import Weight, Weights
from ..attention_kernels import padded_head
from ..constants import THREADS
from ..device.arrays import FLOAT16, FLOAT32, UINT8, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..programs import LATENT, weight_program
from ..weights.matrix import Matrix
from ..weights.staging import repack
from .attention import ROTATION_GROWTH, AttentionOps
from .batch import TOKENS_AT_ONCE
from .dense import DenseOps
from .heads import Heads

_SUMS_BYTES = 256 << 20  # of a matrix's sums that exist at a time
_WHOLE_TILES = 256  # rows that are multiplied at a time are a multiple of this
_HEADS_A_BLOCK = THREADS["latent_heads"] // 32  # of latent_queries and latent_heads: a warp has one


@dataclass(frozen=True)
class _LatentRows:
    """A layer's latent rows: those that its keys and values are made of, of all tokens that the batch sees.

    c: their operand. k_r: halves [rows, rotary], holding values times *scale.
    """

    c: Operand
    k_r: DeviceArray
    scale: DeviceArray


@dataclass(frozen=True)
class _Sums:
    """What matrices make of latent rows: float32 [rows, heads * step], of which each head's keys, or values, begin at
    multiples of step. scale: of the halves that are made of them."""

    values: DeviceArray
    step: int
    scale: DeviceArray


def expanded_bytes(family: Family, rows: int) -> int:
    """Bytes that work arrays take for what so many latent rows of a layer are expanded to; 0 for a family without
    any."""
    most, heads = 0, family.config.head_count
    for index, state in enumerate(family.layer_states):
        if isinstance(state, Latent):
            key, value = family.head_dims(index)
            width = heads * (key - state.rotary + value)
            kept = FLOAT16.itemsize * rows * heads * (padded_head(key) + padded_head(value))
            made = FLOAT32.itemsize * width + HALVES.dtype.itemsize * HALVES.padded(state.rank)
            most = max(most, kept + min(rows, _rows_at_once(width)) * made)
    return most


class LatentOps(AttentionOps, DenseOps):
    """Part of CudaOps."""

    def latent_attention(
        self, h: Operand, w: Weights, latent: LatentAttention, *, rope: Rope | None, scale: float
    ) -> Operand:
        rows = self._latent_rows(h, w, latent, rope)
        q = self._latent_queries(h, w, latent, rope)  # normalises: h is overwritten
        if self.collector is not None and not latent.joined:
            self._hear_values(q, rows, w, latent, scale)
        k, v = self._expanded(rows, w, latent)
        return self.attention(q, k, v, scale=scale)

    def _latent_rows(self, h: Operand, w: Weights, latent: LatentAttention, rope: Rope | None) -> _LatentRows:
        """Make the batch's latent rows where the layer keeps them. Returns those of the tokens before, too."""
        assert h.length is not None, "what latent rows are made of comes from a norm"
        weight, pairs = w.attn_kv_a_mqa, rope.width // 2 if rope is not None else 0
        matrix, bias = self.matrix(weight), self.bias(weight)
        norm, host_norm = self.context.small.vector(w.attn_kv_a_norm.tensor)
        length = math.sqrt(latent.rank)  # of a row after division by the norm's weight
        c_scale = self.scales.of_bound(length * float(np.abs(host_norm).max()))
        c, k_r = self.states.latent(self.layer)
        first = self.batch.start * (self.cache is not None)
        self.hear([weight], h)
        for t, end in _pieces(self.n, matrix.rows):
            self.enter("linear", [weight], end - t)
            both = self.work.array("latent sums", FLOAT32, end - t, matrix.rows)
            self.multiply(h.part(t, end), [matrix], both, bias)
            self.enter("rest")
            growth = ROTATION_GROWTH * rope.magnitude if rope is not None else 1.0
            scale = self.scales.of_outputs(matrix, growth * h.length, bias)
            self.launcher.launch(
                LATENT,
                "latent_rows",
                grid=end - t,
                both=both,
                weight=norm,
                c=c.rows(first + t),
                k_r=k_r.rows(first + t),
                rank=latent.rank,
                stride=c.shape[1],
                rotary=latent.rotary,
                epsilon=self.config.norm_epsilon,
                table=self._rope_table(rope).rows(t) if rope is not None else None,
                pairs=pairs,
                interleaved=int(rope is not None and rope.interleaved),
                c_scale=c_scale,
                r_scale=scale,
            )
        end = first + self.n
        self.states.note_scales(self.layer, c_scale, scale)
        return _LatentRows(Operand(c.rows(0, end), latent.rank, c_scale, norm, length), k_r.rows(0, end), scale)

    def _latent_queries(self, h: Operand, w: Weights, latent: LatentAttention, rope: Rope | None) -> Heads:
        if latent.query_rank:
            self.enter("linear", [w.attn_q_a], self.n)
            self.hear([w.attn_q_a], h)
            matrix = self.matrix(w.attn_q_a)
            made = self.work.array("latent query rows", FLOAT32, self.n, matrix.rows)
            self.multiply(h, [matrix], made, self.bias(w.attn_q_a))
            h = self.normalise(made, w.attn_q_a_norm)
        assert h.length is not None, "what queries are made of comes from a norm"
        weight = w.attn_q_b if latent.query_rank else w.attn_q
        self.hear([weight], h)
        matrix, bias = self.matrix(weight), self.bias(weight)
        padded = self.attending(latent.head_dim, latent.value_dim).config.head_dim
        q = self.work.array("q", FLOAT16, self.n, latent.heads, padded)
        growth = 1.0
        if rope is not None:
            hottest = float(rope.temperature(np.array(self.config.context_length)))
            growth = hottest * max(1.0, ROTATION_GROWTH * rope.magnitude)
        for t, end in _pieces(self.n, matrix.rows):
            self.enter("linear", [weight], end - t)
            sums = self.work.array("latent sums", FLOAT32, end - t, matrix.rows)
            self.multiply(h.part(t, end), [matrix], sums, bias)
            if self.collector is not None and not latent.joined:
                still, length = w.attn_k_b_weight.name, self.sequence_length
                self.collector.add_heads(still, sums, latent.heads, latent.key_dim, length, t)
            self.enter("rest")
            scale = self.scales.of_outputs(matrix, growth * h.length, bias)
            self.launcher.launch(
                LATENT,
                "latent_queries",
                grid=(end - t, -(-latent.heads // _HEADS_A_BLOCK)),
                sums=sums,
                q=q.rows(t, end),
                heads=latent.heads,
                still=latent.key_dim,
                rotary=latent.rotary,
                padded=padded,
                table=self._rope_table(rope).rows(t) if rope is not None else None,
                pairs=rope.width // 2 if rope is not None else 0,
                interleaved=int(rope is not None and rope.interleaved),
                scale=scale,
                positions=self.positions.rows(t),
                beta=rope.beta if rope is not None else 0.0,
                beta_length=rope.beta_length if rope is not None else 1,
            )
        return Heads(q, scale, latent.head_dim)

    def _expanded(self, rows: _LatentRows, w: Weights, latent: LatentAttention) -> tuple[Heads, Heads]:
        """The keys and values of latent rows: of a cache's in order, of a batch's where attention_layout has them."""
        attending, heads, cached = self.attending(latent.head_dim, latent.value_dim), latent.heads, self.cache
        config, row_of = attending.config, attending.key_row_of
        # Of a cache as many rows as it may ever have, so that the arrays stay where they are.
        room = cached.capacity if cached is not None else self.key_rows
        k = self.work.array("k", FLOAT16, room, heads, config.head_dim)
        v = self.work.array("v", FLOAT16, room, heads, config.value_dim)
        self.enter("rest")
        matrices = self._decompressors(w, latent)
        if latent.joined:
            self.hear([w.attn_kv_b_weight], rows.c)
        width = heads * (latent.key_dim + latent.value_dim)
        most = min(room, _rows_at_once(width))
        for t, end in _pieces(rows.c.rows, width):
            self.enter("linear", latent.decompressing(w), end - t)
            keys, values = self._decompressed(self._latent_part(rows.c, t, end, most), matrices, latent, most)
            self.enter("rest")
            k_scale = self._smaller(keys.scale, rows.scale)
            self.launcher.launch(
                LATENT,
                "latent_heads",
                grid=(end - t, -(-heads // _HEADS_A_BLOCK)),
                keys=keys.values,
                values=values.values,
                key_step=keys.step,
                value_step=values.step,
                k_r=rows.k_r.rows(t, end),
                k=k.rows(t if row_of is None else 0),
                v=v.rows(t if row_of is None else 0),
                heads=heads,
                still=latent.key_dim,
                rotary=latent.rotary,
                value_dim=latent.value_dim,
                key_padded=config.head_dim,
                value_padded=config.value_dim,
                r_scale=rows.scale,
                k_scale=k_scale,
                v_scale=values.scale,
                key_rows=row_of.rows(t) if row_of is not None else None,
            )
        if attending.key_copies is not None:
            self._copy_rows(k, v, attending.key_copies)
        return Heads(k, k_scale, latent.head_dim), Heads(v, values.scale, latent.value_dim)

    def _hear_values(self, q: Heads, rows: _LatentRows, w: Weights, latent: LatentAttention, scale: float) -> None:
        """Let the collector hear what llama.cpp multiplies by attn_v_b: what attention makes of the latent rows.

        They are attended to as values, as many columns at a time as a value has, in the place of the layer's own
        values, which are to be made again.
        """
        assert self.collector is not None and self.attending(latent.head_dim, latent.value_dim).key_copies is None
        k, v = self._expanded(rows, w, latent)
        parts = -(-latent.rank // latent.value_dim)
        for part in range(parts):
            self.launcher.launch(
                LATENT,
                "latent_values",
                grid=(rows.c.rows, -(-latent.heads // _HEADS_A_BLOCK)),
                c=rows.c.values,
                stride=rows.c.values.shape[1],
                rank=latent.rank,
                first=part * latent.value_dim,
                value_dim=latent.value_dim,
                v=v.values,
                heads=latent.heads,
                value_padded=v.values.shape[2],
            )
            made = self.attention(q, k, replace(v, scale=rows.c.scale), scale=scale)
            name, length = w.attn_v_b_weight.name, self.sequence_length
            self.collector.add_part(name, made, length, part, parts, latent.rank, latent.heads)

    def _latent_part(self, c: Operand, t: int, end: int, most: int) -> Operand:
        """Rows t to end - 1, at most `most`. Those of a cache are copied to where every layer's are, so that a batch
        asks for few tensor maps."""
        part = c.part(t, end)
        if self.cache is None:
            return part
        copy = self.work.array("latent part", part.format.dtype, most, part.values.shape[1]).rows(0, end - t)
        self.context.gpu.copy(copy.address, part.values.address, copy.nbytes)
        self.launcher.fence()
        return replace(part, values=copy)

    def _decompressors(self, w: Weights, latent: LatentAttention) -> tuple[Matrix, ...]:
        """The matrix of keys and values, or that of keys and that of values."""
        if latent.joined:
            return (self.matrix(w.attn_kv_b_weight),)
        return self._transposed(w.attn_k_b_weight), self.matrix(w.attn_v_b_weight)

    def _decompressed(
        self, c: Operand, matrices: tuple[Matrix, ...], latent: LatentAttention, most: int
    ) -> tuple[_Sums, _Sums]:
        """Keys without what is rotated, and values, of these rows, at most `most`."""
        assert c.length is not None, "latent rows come from a norm"
        made = []
        for name, matrix in zip(("latent sums", "latent value sums"), matrices):
            sums = self.work.array(name, FLOAT32, most, matrix.rows).rows(0, c.rows)
            self.multiply(c, [matrix], sums)
            made.append(_Sums(sums, matrix.rows // latent.heads, self.scales.of_outputs(matrix, c.length, None)))
        if latent.joined:  # each head's key, then its value
            made.append(replace(made[0], values=made[0].values.columns(latent.key_dim)))
        keys, values = made
        return keys, values

    def _transposed(self, weight: Weight) -> Matrix:
        """attn_k_b [heads, rank, key_dim], whose rows are quantised the other way, as the matrix [heads * key_dim,
        rank] of keys, float32 in work memory."""
        heads, rank, key_dim = weight.shape
        source = self.matrix(weight)
        raw = self.work.array("latent matrix decoded", FLOAT32, heads * key_dim, rank)
        self.launcher.launch(
            weight_program(source.type),
            "decode_transposed",
            grid=source.row_tiles,
            weights=source.array,
            units=source.units,
            rows=source.rows,
            columns=key_dim,
            height=rank,
            out=raw,
        )
        matrix = Matrix(f"{weight.name} transposed", GGML.F32, 0, heads * key_dim, rank)
        tiles = self.work.array("latent matrix", UINT8, *matrix.array.shape)
        matrix = replace(matrix, address=tiles.address)
        repack(self.launcher, matrix, 0, DeviceArray(raw.address, UINT8, (heads * key_dim, raw.row_bytes)))
        self.launcher.fence()  # GEMMs read weights without waiting for the kernel before them
        return matrix

    def _smaller(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        """The smaller of two scales."""

        def make(scale: DeviceArray) -> None:
            self.launcher.launch(LATENT, "smaller_scale", grid=1, a=a, b=b, scale=scale)

        return self.context.small.once(("smaller", a.address, b.address), FLOAT32, (1,), make)


def _rows_at_once(width: int) -> int:
    """Of how many rows sums, `width` each, exist at a time."""
    most = _SUMS_BYTES // (FLOAT32.itemsize * width) // _WHOLE_TILES * _WHOLE_TILES
    return max(_WHOLE_TILES, min(TOKENS_AT_ONCE, most))


def _pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the rows that are multiplied at a time."""
    step = _rows_at_once(width)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
