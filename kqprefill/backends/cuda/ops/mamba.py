"""Mamba-2 (arXiv 2405.21060): a recurrence in chunks, which kernels/mamba_inputs.cu and mamba_scan.cu compute."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from ....models.mamba2 import Mamba2
from ....models.weights import Weights
from ..constants import DELTA_CHUNK, THREADS
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..device.compiler import Program
from ..gemm.operand import HALVES, Operand
from ..kv_cache import halo_rows
from ..mamba_kernels import SLICE, inputs_program, padded_head, scan_config
from .recurrence import Piece, RecurrenceOps

_SCALES = 4  # that mamba_scales makes


@dataclass(frozen=True)
class _Chunked:
    """What the kernels make of a piece's inputs for each chunk, and head or group (kernels/mamba_inputs.cu)."""

    u: DeviceArray
    b: DeviceArray
    c: DeviceArray
    p: DeviceArray
    steps: DeviceArray
    decay: DeviceArray


class MambaOps(RecurrenceOps):
    """Part of CudaOps."""

    def mamba2(self, h: Operand, w: Weights, net: Mamba2) -> Operand:
        assert h.length is not None, "what goes into a recurrence comes from a norm"
        weights = w.ssm_in_z, w.ssm_in_xbc, w.ssm_in_dt
        self.hear(weights, h)
        matrices = [self.matrix(weight) for weight in weights]
        halo, most = halo_rows(net.state), self.most_rows
        kept = self.cache.recurrent(self.layer) if self.cache is not None else None
        z = self.work.array("mamba gates", FLOAT32, most, net.width)
        sums = self.work.array("mamba sums", FLOAT32, halo + most, net.channels)
        rates = self.work.array("mamba rates", FLOAT32, halo + most, net.heads)
        o = self.work.array("mamba outputs", FLOAT32, self.n, net.width)
        states = self.states_of("mamba", net.state, kept)
        out, scale = self._out(w, net)
        for piece in self.through_pieces(net.state, kept, sums, rates):
            rows, own = piece.last - piece.first, h.part(piece.first, piece.last)
            self.enter("linear", weights, rows)
            made = z.rows(0, rows), sums.rows(halo, halo + rows), rates.rows(halo, halo + rows)
            for weight, matrix, to in zip(weights, matrices, made):
                self.multiply(own, [matrix], to, self.bias(weight))
            self.enter("recurrence")
            scales, o_rows = self._mamba_scales(w, net, h.length), o.rows(piece.first, piece.last)
            chunked = self._chunked(sums.rows(halo), rates.rows(halo), piece.chunks, w, net, scales, o_rows)
            self._mamba_scan(chunked, piece, net, scales, states, o_rows)
            self.launcher.launch(
                inputs_program(net.kernel),
                "mamba_output",
                grid=(rows, net.groups if out is not None else 1),
                o=o_rows,
                z=z,
                norm=self.vector(w.get("ssm_norm_weight")),
                columns=net.width // (net.groups if out is not None else 1),
                epsilon=self.config.norm_epsilon,
                scale=scale,
                out=out.rows(piece.first, piece.last) if out is not None else None,
                stride=out.shape[1] if out is not None else 0,
            )
        return self.cast(o) if out is None else Operand(out, net.width, scale)

    def _out(self, w: Weights, net: Mamba2) -> tuple[DeviceArray | None, DeviceArray]:
        """Where the outcome's halves go, and their scale; without a norm nothing bounds them, and they are cast row by
        row."""
        norm = w.get("ssm_norm_weight")
        if norm is None:
            return None, self.scales.unit()
        _, host = self.context.small.vector(norm.tensor)
        largest = math.sqrt(net.width // net.groups) * float(np.abs(host).max())
        return self.work.array("mamba", HALVES.dtype, self.n, HALVES.padded(net.width)), self.scales.of_bound(largest)

    def _mamba_scales(self, w: Weights, net: Mamba2, length: float) -> DeviceArray:
        """kernels/mamba_inputs.cu: mamba_scales."""
        inputs, steps = self.matrix(w.ssm_in_xbc), self.matrix(w.ssm_in_dt)

        def make(scales: DeviceArray) -> None:
            self.launcher.launch(
                inputs_program(net.kernel),
                "mamba_scales",
                grid=1,
                norms=self.scales.row_norms(inputs),
                sum_bias=self.bias(w.ssm_in_xbc),
                taps=self.vector(w.ssm_conv1d),
                bias=self.bias(w.ssm_conv1d),
                step_norms=self.scales.row_norms(steps),
                step_sum_bias=self.bias(w.ssm_in_dt),
                step_bias=self.vector(w.ssm_dt_bias),
                rate=self.vector(w.ssm_a),
                width=net.width,
                state_width=net.groups * net.state_size,
                heads=net.heads,
                gain=length,
                scales=scales,
            )

        return self.scales.made(inputs.name, _SCALES, make)

    def _chunked(
        self,
        sums: DeviceArray,
        rates: DeviceArray,
        chunks: DeviceArray,
        w: Weights,
        net: Mamba2,
        scales: DeviceArray,
        o: DeviceArray,
    ) -> _Chunked:
        """What there is to know of each chunk; and o = skip * x."""
        room, count, padded = self.room_for(chunks), chunks.shape[0], padded_head(net.head_dim)

        def halves(name: str, parts: int, columns: int) -> DeviceArray:
            return self.work.array(f"mamba {name}", FLOAT16, room, parts, DELTA_CHUNK, columns)

        made = _Chunked(
            halves("u", net.heads, padded),
            halves("b", net.groups, net.state_size),
            halves("c", net.groups, net.state_size),
            halves("p", net.heads, DELTA_CHUNK),
            self.work.array("mamba steps", FLOAT32, room, net.heads, DELTA_CHUNK),
            self.work.array("mamba decay", FLOAT32, room, net.heads, DELTA_CHUNK),
        )
        program = inputs_program(net.kernel)
        self.launcher.launch(
            program,
            "mamba_steps",
            grid=count,
            rates=rates,
            step_bias=self.vector(w.ssm_dt_bias),
            rate=self.vector(w.ssm_a),
            chunks=chunks,
            heads=net.heads,
            steps=made.steps,
            decay=made.decay,
        )
        self.launcher.launch(
            program,
            "mamba_inputs",
            grid=(count, -(-net.channels // THREADS["mamba_inputs"])),
            sums=sums,
            taps=self.vector(w.ssm_conv1d),
            bias=self.bias(w.ssm_conv1d),
            skip=self.vector(w.ssm_d),
            steps=made.steps,
            chunks=chunks,
            heads=net.heads,
            head_dim=net.head_dim,
            padded=padded,
            groups=net.groups,
            state=net.state_size,
            scales=scales,
            u=made.u,
            b=made.b,
            c=made.c,
            o=o,
        )
        self.launcher.launch(
            self._scan_program(net, count * net.heads),
            "mamba_prepare",
            grid=(count, net.heads),
            b=made.b,
            c=made.c,
            decay=made.decay,
            heads=net.heads,
            groups=net.groups,
            p=made.p,
        )
        return made

    def _mamba_scan(
        self, made: _Chunked, piece: Piece, net: Mamba2, scales: DeviceArray, states: DeviceArray, o: DeviceArray
    ) -> None:
        padded = padded_head(net.head_dim)
        for sequences in piece.sequences:
            grid = sequences.shape[0], net.heads * (padded // SLICE)
            self.launcher.launch(
                self._scan_program(net, grid[0] * grid[1]),
                "mamba_scan",
                grid=grid,
                u=made.u,
                b=made.b,
                c=made.c,
                p=made.p,
                decay=made.decay,
                chunks=piece.chunks,
                sequences=sequences,
                heads=net.heads,
                groups=net.groups,
                head_dim=net.head_dim,
                padded=padded,
                scales=scales,
                states=states,
                o=o,
            )

    def _scan_program(self, net: Mamba2, blocks: int) -> Program:
        gpu = self.context.gpu
        return scan_config(net.state_size, gpu.shared_memory, blocks <= gpu.multiprocessors).program
