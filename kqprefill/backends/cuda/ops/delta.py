"""Gated DeltaNet (arXiv 2412.06464): a recurrence in chunks, which kernels/delta_inputs.cu, delta_prepare.cu and
delta_scan.cu compute."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from ....models.delta_net import DeltaNet
from ....models.weights import Weights
from ..constants import DELTA_CHUNK
from ..delta_kernels import inputs_program, prepare_program, scan_config
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..kv_cache import halo_rows
from .recurrence import Piece, RecurrenceOps


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


class DeltaOps(RecurrenceOps):
    """Part of CudaOps."""

    def delta_net(self, h: Operand, w: Weights, net: DeltaNet) -> Operand:
        weights = (w.attn_qkv, w.attn_gate, w.ssm_beta, w.ssm_alpha)
        self.hear(weights, h)
        qkv, gate, beta, alpha = (self.matrix(weight) for weight in weights)
        d, heads, halo = net.head_dim, net.value_heads, halo_rows(net.state)
        norm, host_norm = self.context.small.vector(w.ssm_norm.tensor)
        taps, host_taps = self.context.small.vector(w.ssm_conv1d.tensor)
        kept = self.cache.recurrent(self.layer) if self.cache is not None else None
        out = self.work.array("delta", HALVES.dtype, self.n, HALVES.padded(net.value_width))
        most = self.most_rows
        sums = self.work.array("delta sums", FLOAT32, halo + most, net.channels)
        rates = self.work.array("delta rates", FLOAT32, halo + most, 2 * heads)
        z = self.work.array("delta gates", FLOAT32, most, net.value_width)
        o = self.work.array("delta outputs", FLOAT32, most, net.value_width)
        states = self.states_of("delta", net.state, kept)
        for piece in self.through_pieces(net.state, kept, sums, rates):
            rows = piece.last - piece.first
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
        return Operand(out, net.value_width, scale)

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
        room = self.room_for(chunks)

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
        piece: Piece,
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
