"""Gated DeltaNet (arXiv 2412.06464): a recurrence in chunks, which kernels/delta_inputs.cu, delta_prepare.cu and
delta_scan.cu compute."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from ....models.delta_net import DeltaNet
from ....models.family import Family
from ....models.weights import Weights
from ..constants import DELTA_CHUNK
from ..delta_kernels import inputs_program, prepare_program, scan_config
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..kv_cache import halo_rows
from .batch import CHUNKS_AT_ONCE
from .chunk_layout import Part, chunk_layout, parts_of
from .dense import DenseOps


@dataclass(frozen=True)
class _Piece:
    """Tokens first to last - 1 of the batch: their chunks and sequences on the device, and how many states they leave.
    goes_on: whether they follow those of the piece before, or of a cache, in a sequence."""

    first: int
    last: int
    goes_on: bool
    chunks: DeviceArray
    sequences: list[DeviceArray]
    states: int


@dataclass(frozen=True)
class _Chunked:
    """What the kernels make of a piece's inputs for each chunk and head, as kernels/delta_prepare.cu describes it."""

    q: DeviceArray
    k: DeviceArray
    v: DeviceArray
    w: DeviceArray
    u: DeviceArray
    p: DeviceArray
    decay: DeviceArray


class DeltaOps(DenseOps):
    """Part of CudaOps."""

    def begin_batch(self, family: Family) -> None:
        super().begin_batch(family)
        self._pieces: list[_Piece] = []
        if family.has_recurrence:
            self._pieces = [
                self._upload_piece(*piece) for piece in enumerate(parts_of(self.batch.segments, CHUNKS_AT_ONCE))
            ]

    def _upload_piece(self, number: int, part: Part) -> _Piece:
        layout = chunk_layout(part.segments, part.keeps)
        sequences = [
            self.work.upload(f"sequences {number}.{level}", array) for level, array in enumerate(layout.sequences)
        ]
        states = max(layout.states, self.planned_chunks // 2)  # a sequence that leaves one is followed by another
        goes_on = part.keeps and part.segments[0].position > 0
        return _Piece(
            part.first, part.last, goes_on, self.work.upload(f"chunks {number}", layout.chunks), sequences, states
        )

    def delta_net(self, h: Operand, w: Weights, net: DeltaNet) -> Operand:
        weights = (w.attn_qkv, w.attn_gate, w.ssm_beta, w.ssm_alpha)
        self.hear(weights, h)
        qkv, gate, beta, alpha = (self.matrix(weight) for weight in weights)
        d, heads, halo = net.head_dim, net.value_heads, halo_rows(net.state)
        norm, host_norm = self.context.small.vector(w.ssm_norm.tensor)
        taps, host_taps = self.context.small.vector(w.ssm_conv1d.tensor)
        kept = self.cache.recurrent(self.layer) if self.cache is not None else None
        out = self.work.array("delta", HALVES.dtype, self.n, HALVES.padded(net.value_width))
        most = max(piece.last - piece.first for piece in self._pieces)
        sums = self.work.array("delta sums", FLOAT32, halo + most, net.channels)
        rates = self.work.array("delta rates", FLOAT32, halo + most, 2 * heads)
        z = self.work.array("delta gates", FLOAT32, most, net.value_width)
        o = self.work.array("delta outputs", FLOAT32, most, net.value_width)
        states = kept.state if kept is not None else self._states(net)
        if kept is not None and self.batch.start:
            self._copy(sums.rows(0, halo), kept.sums)
            self._copy(rates.rows(0, halo), kept.rates)
        before = 0  # rows of the piece before
        for piece in self._pieces:
            rows = piece.last - piece.first
            if before and piece.goes_on:
                self._copy(sums.rows(0, halo), sums.rows(before, before + halo))
                self._copy(rates.rows(0, halo), rates.rows(before, before + halo))
            self.enter("linear", weights, rows)
            own = h.part(piece.first, piece.last)
            self.multiply(own, [qkv], sums.rows(halo, halo + rows))
            self.multiply(own, [gate], z.rows(0, rows))
            self.multiply(own, [beta, alpha], rates.rows(halo, halo + rows))
            self.enter("recurrence")
            assert h.length is not None, "what goes into a recurrence comes from a norm"
            largest_tap = float(np.abs(host_taps).sum(axis=1).max())
            v_scale = self.scales.of_outputs(qkv, h.length * largest_tap, None)
            loudest = math.sqrt(d) * float(np.abs(host_norm).max())
            scale = self.scales.of_outputs(gate, h.length * loudest, None)
            chunked = self._prepare(sums.rows(halo), rates.rows(halo), piece.chunks, taps, w, net, v_scale)
            self._scan(chunked, piece, net, v_scale, states, o)
            self.launcher.launch(
                inputs_program(d, net.kernel),
                "delta_output",
                grid=rows,
                o=o,
                z=z,
                norm=norm,
                heads=heads,
                epsilon=self.config.norm_epsilon,
                scale=scale,
                out=out.rows(piece.first, piece.last),
                stride=out.shape[1],
            )
            before = rows
        if kept is not None:
            self._copy(kept.sums, sums.rows(before, before + halo))
            self._copy(kept.rates, rates.rows(before, before + halo))
        return Operand(out, net.value_width, scale)

    def _states(self, net: DeltaNet) -> DeviceArray:
        count = max(1, max(piece.states for piece in self._pieces))
        return self.work.array("delta states", FLOAT32, count, net.value_heads, net.head_dim, net.head_dim)

    def _copy(self, to: DeviceArray, source: DeviceArray) -> None:
        self.context.gpu.copy(to.address, source.address, to.nbytes)
        self.launcher.fence()

    def _prepare(
        self,
        sums: DeviceArray,
        rates: DeviceArray,
        chunks: DeviceArray,
        taps: DeviceArray,
        w: Weights,
        net: DeltaNet,
        v_scale: DeviceArray,
    ) -> _Chunked:
        count, d, heads = chunks.shape[0], net.head_dim, net.value_heads
        room = max(count, self.planned_chunks)

        def halves(name: str, heads: int, columns: int) -> DeviceArray:
            return self.work.array(f"delta {name}", FLOAT16, room, heads, DELTA_CHUNK, columns)

        chunked = _Chunked(
            halves("q", net.key_heads, d),
            halves("k", net.key_heads, d),
            halves("v", heads, d),
            halves("w", heads, d),
            halves("u", heads, d),
            halves("p", heads, DELTA_CHUNK),
            self.work.array("delta decay", FLOAT32, room, heads, DELTA_CHUNK),
        )
        self.launcher.launch(
            inputs_program(d, net.kernel),
            "delta_inputs",
            grid=(count, 2 * net.key_heads + heads),
            sums=sums,
            taps=taps,
            chunks=chunks,
            channels=net.channels,
            key_heads=net.key_heads,
            value_heads=heads,
            epsilon=self.config.norm_epsilon,
            v_scale=v_scale,
            q=chunked.q,
            k=chunked.k,
            v=chunked.v,
        )
        self.launcher.launch(
            prepare_program(d),
            "delta_prepare",
            grid=(count, heads),
            q=chunked.q,
            k=chunked.k,
            v=chunked.v,
            gates=rates,
            rate=self.vector(w.ssm_a),
            step_bias=self.vector(w.ssm_dt_bias),
            chunks=chunks,
            key_heads=net.key_heads,
            value_heads=heads,
            by_turns=int(net.by_turns),
            w=chunked.w,
            u=chunked.u,
            p=chunked.p,
            decay=chunked.decay,
        )
        return chunked

    def _scan(
        self,
        chunked: _Chunked,
        piece: _Piece,
        net: DeltaNet,
        v_scale: DeviceArray,
        states: DeviceArray,
        o: DeviceArray,
    ) -> None:
        # A state's values are at most as many times a value's as the sequence has tokens: each adds a projection of its
        # own.
        growth = math.ceil(math.log2(self.config.context_length)) - math.log2(DELTA_CHUNK)
        facts = self.context.gpu
        for sequences in piece.sequences:
            heads = sequences.shape[0] * net.value_heads
            config = scan_config(net.head_dim, facts.shared_memory, heads, facts.multiprocessors)
            self.launcher.launch(
                config.program,
                "delta_scan",
                grid=(sequences.shape[0], net.value_heads * config.slices),
                q=chunked.q,
                k=chunked.k,
                w=chunked.w,
                u=chunked.u,
                p=chunked.p,
                decay=chunked.decay,
                chunks=piece.chunks,
                sequences=sequences,
                key_heads=net.key_heads,
                value_heads=net.value_heads,
                by_turns=int(net.by_turns),
                v_scale=v_scale,
                state_factor=2.0 ** -max(0.0, growth),
                states=states,
                o=o,
            )
