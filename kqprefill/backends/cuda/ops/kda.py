"""Kimi Delta Attention (arXiv 2510.26692): convolutions as Gated DeltaNet's (kernels/delta_inputs.cu), and a recurrence
token by token (kernels/kda.cu)."""

from __future__ import annotations

import math

import numpy as np

from ....models.kda import KimiDelta
from ....models.weights import Weights
from ..constants import DELTA_CHUNK, THREADS
from ..delta_kernels import inputs_program, kda_program
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..gemm.operand import HALVES, Operand
from ..kv_cache import halo_rows
from .recurrence import RecurrenceOps

_LANES = 8  # that share a column of a state (kernels/kda.cu: kParts)


class KdaOps(RecurrenceOps):
    """Part of CudaOps."""

    def kda(self, h: Operand, w: Weights, net: KimiDelta) -> Operand:
        assert h.length is not None, "what goes into a recurrence comes from a norm"
        d, heads, width, halo, most = net.head_dim, net.heads, net.width, halo_rows(net.state), self.most_rows
        mixed = w.attn_q, w.attn_k, w.attn_v
        kept = self.cache.recurrent(self.layer) if self.cache is not None else None
        steps, gates = self.project(h, w.ssm_f_a, "decays"), self.project(h, w.ssm_g_a, "gates")
        self.hear([*mixed, w.ssm_beta], h)
        self.hear([w.ssm_f_b], steps)
        self.hear([w.ssm_g_b], gates)
        sums = self.work.array("kda sums", FLOAT32, halo + most, 3 * width)
        rates = self.work.array("kda rates", FLOAT32, halo + most, width + heads)
        f, z, o = (self.work.array(f"kda {name}", FLOAT32, most, width) for name in ("steps", "gates", "outputs"))
        beta = self.work.array("kda beta", FLOAT32, most, heads)
        states = self.states_of("kda", net.state, kept)
        norm, host_norm = self.context.small.vector(w.ssm_norm.tensor)
        scale = self.scales.of_bound(math.sqrt(d) * float(np.abs(host_norm).max()))
        out = self.work.array("kda", HALVES.dtype, self.n, HALVES.padded(width))
        program = kda_program(d)
        for piece in self.through_pieces(net.state, kept, sums, rates):
            rows, own = piece.last - piece.first, (piece.first, piece.last)
            self.enter("linear", [*mixed, w.ssm_beta, w.ssm_f_b, w.ssm_g_b], rows)
            self.multiply(h.part(*own), [self.matrix(weight) for weight in mixed], sums.rows(halo, halo + rows))
            for a, weight, to in ((h, w.ssm_beta, beta), (steps, w.ssm_f_b, f), (gates, w.ssm_g_b, z)):
                self.multiply(a.part(*own), [self.matrix(weight)], to.rows(0, rows))
            self.enter("recurrence")
            self.launcher.launch(
                program,
                "kda_rates",
                grid=rows,
                f=f,
                b=beta,
                step_bias=self.vector(w.ssm_dt_bias),
                rate=self.vector(w.ssm_a),
                heads=heads,
                rates=rates.rows(halo),
            )
            q, k, v, v_scale = self._convolved(sums.rows(halo), piece.chunks, w, net, h.length)
            for sequences in piece.sequences:
                self.launcher.launch(
                    program,
                    "kda_scan",
                    grid=(sequences.shape[0], heads * (d // (THREADS["kda_scan"] // _LANES))),
                    q=q,
                    k=k,
                    v=v,
                    rates=rates.rows(halo),
                    chunks=piece.chunks,
                    sequences=sequences,
                    heads=heads,
                    v_scale=v_scale,
                    states=states,
                    o=o,
                )
            self.launcher.launch(
                program,
                "kda_output",
                grid=rows,
                o=o,
                z=z,
                norm=norm,
                heads=heads,
                epsilon=self.config.norm_epsilon,
                scale=scale,
                out=out.rows(*own),
                stride=out.shape[1],
            )
        return Operand(out, width, scale)

    def _convolved(
        self, sums: DeviceArray, chunks: DeviceArray, w: Weights, net: KimiDelta, length: float
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """q, k and v of each chunk and head, as halves, and the scale of v."""
        d, heads, count, room = net.head_dim, net.heads, chunks.shape[0], self.room_for(chunks)
        convolutions = w.ssm_conv1d_q, w.ssm_conv1d_k, w.ssm_conv1d_v
        taps, host_taps = self.context.small.vector(*(weight.tensor for weight in convolutions))
        of_v = host_taps.reshape(3, -1, net.kernel)[2]
        q, k, v = (self.work.array(f"kda {name}", FLOAT16, room, heads, DELTA_CHUNK, d) for name in "qkv")
        largest_tap = float(np.abs(of_v).sum(axis=1).max())
        v_scale = self.scales.of_outputs(self.matrix(w.attn_v), length * largest_tap, None)
        self.launcher.launch(
            inputs_program(d, net.kernel),
            "delta_inputs",
            grid=(count, 3 * heads),
            sums=sums,
            taps=taps,
            chunks=chunks,
            channels=3 * net.width,
            key_heads=heads,
            value_heads=heads,
            epsilon=self.config.norm_epsilon,
            v_scale=v_scale,
            q=q,
            k=k,
            v=v,
        )
        return q, k, v, v_scale
