"""Products in int8 (kqprefill/models/precision.py): what all ways to make them share; and kernels/gemm_int8_sm80.cu."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from ..device.arrays import FLOAT32, INT8, DeviceArray
from ..device.compiler import Program
from ..device.gpu import GpuFacts
from ..device.launcher import Launches, begun_early
from ..device.workspace import Workspace
from ..programs import rounding
from ..weights.matrix import Matrix
from .operand import BYTES, MORE_ROWS, Gemm, Groups, Operand, listed, made_into, number_of
from .portable import PortableConfig, best_config

_FOUR_BYTES = 4 * FLOAT32.itemsize  # of four columns of float32


class Int8Gemm(Gemm):
    """Operands are made int8 for each product; W is so already."""

    def __init__(self, facts: GpuFacts, launcher: Launches, work: Workspace) -> None:
        self._facts, self._launcher, self._work = facts, launcher, work

    def rounded(self, a: Operand) -> Operand:
        """An operand in BYTES: as it is, as its maker has made it beside halves, or made of its halves here."""
        if a.format is BYTES:
            return a
        if a.rounded is not None:
            return replace(a, values=a.rounded[0], scale=a.rounded[1], format=BYTES)
        padded = BYTES.padded(a.columns)
        values = self._work.array("int8 operand", BYTES.dtype, a.rows, padded)
        scales = self._work.array("int8 operand's scales", FLOAT32, a.rows + MORE_ROWS)
        rows_program = rounding(padded, a.rows)
        with begun_early(self._launcher):
            self._launcher.launch(
                rows_program.program,
                "round_rows",
                grid=rows_program.blocks(a.rows),
                x=a.values,
                rows=a.rows,
                stride=a.values.shape[1],
                scale=a.scale,
                out=values,
                padded=padded,
                scales=scales,
            )
        return replace(a, values=values, scale=scales, format=BYTES)

    def linear(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None = None,
        out_scale: DeviceArray | None = None,
        ldo: int | None = None,
    ) -> None:
        total = sum(matrix.rows for matrix in matrices)
        self.multiply(self.rounded(a), matrices, out, bias, add, groups, out_scale, ldo or total)

    @abstractmethod
    def multiply(
        self,
        x: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None,
        out_scale: DeviceArray | None,
        ldo: int,
    ) -> None:
        """As `linear`, of a rounded operand."""


def in_fours(matrices: Sequence[Matrix], out: DeviceArray, ldo: int) -> bool:
    """Whether all matrices' outputs have whole fours of columns, which can be written at once."""
    return out.address % _FOUR_BYTES == 0 and all(count % 4 == 0 for count in (ldo, *(m.rows for m in matrices)))


@dataclass(frozen=True)
class Kind:
    """Which product a program of int8 makes: of gate and up, or of one matrix with an activation, or neither; grouped:
    over a stack of experts; in_blocks: whose outputs are rounded by blocks (operand.output_row_bytes)."""

    gated: bool = False
    activated: bool = False
    grouped: bool = False
    in_blocks: bool = False

    @classmethod
    def linear(cls, groups: Groups | None, out: DeviceArray) -> Kind:
        """Of Gemm.linear."""
        return cls(grouped=groups is not None, in_blocks=out.dtype == INT8)

    @property
    def constants(self) -> tuple[tuple[str, str], ...]:
        """The defines that say so."""
        return tuple((field.name.upper(), str(int(getattr(self, field.name)))) for field in fields(self))


KINDS = (
    Kind(),
    Kind(grouped=True),
    Kind(grouped=True, in_blocks=True),
    Kind(gated=True),
    Kind(gated=True, grouped=True),
    Kind(activated=True),
)


@cache
def portable_program(config: PortableConfig, kind: Kind) -> Program:
    """gemm_int8_sm80.cu with tiles as gemm_sm80.cu's, whose columns are half as wide."""
    halves = config.program()
    return Program("gemm_int8_sm80.cu", (*config.tiles, *kind.constants), halves.threads, halves.shared_bytes)


class PortableInt8Gemm(Int8Gemm):
    """For sm_80 and later."""

    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        return best_config(m, sum(matrix.rows for matrix in matrices), self._facts, experts).block_m

    def multiply(
        self,
        x: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None,
        out_scale: DeviceArray | None,
        ldo: int,
    ) -> None:
        first, experts = 0, number_of(groups)
        for matrix in matrices:
            config = best_config(x.rows, matrix.rows, self._facts, experts)
            self._launcher.launch(
                portable_program(config, Kind.linear(groups, out)),
                "gemm_linear",
                grid=config.grid(x.rows, matrix.rows, self._facts.multiprocessors, experts),
                x=x.values,
                x_scale=x.scale,
                w=matrix.array,
                w_scale=matrix.scales,
                m=x.rows,
                n=matrix.rows,
                k=x.values.shape[1],
                out=out.columns(first),
                ldo=ldo,
                out_scale=out_scale,
                bias=bias if bias is None or groups is not None else bias.rows(first),
                add=int(add),
                **listed(groups),
            )
            first += matrix.rows

    def activated(
        self,
        a: Operand,
        matrix: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        activation: str,
    ) -> None:
        x, width = self.rounded(a), act.values.shape[1]
        config = best_config(x.rows, width, self._facts)
        self._launcher.launch(
            portable_program(config, Kind(activated=True)),
            "gemm_activated",
            grid=config.grid(x.rows, width, self._facts.multiprocessors),
            x=x.values,
            x_scale=x.scale,
            w=matrix.array,
            w_scale=matrix.scales,
            m=x.rows,
            features=matrix.rows,
            k=x.values.shape[1],
            **made_into(act, activation),
            bias=bias,
        )

    def gated(
        self,
        a: Operand,
        gate: Matrix,
        up: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        biases: tuple[DeviceArray | None, DeviceArray | None],
        activation: str,
        groups: Groups | None = None,
    ) -> None:
        x, width, experts = self.rounded(a), act.values.shape[1], number_of(groups)
        config = best_config(x.rows, 2 * gate.rows, self._facts, experts)
        gate_bias, up_bias = biases
        self._launcher.launch(
            portable_program(config, Kind(gated=True, grouped=groups is not None)),
            "gemm_gated",
            grid=config.grid(x.rows, 2 * width, self._facts.multiprocessors, experts),
            x=x.values,
            x_scale=x.scale,
            gate=gate.array,
            gate_scale=gate.scales,
            up=up.array,
            up_scale=up.scales,
            m=x.rows,
            features=gate.rows,
            k=x.values.shape[1],
            **made_into(act, activation),
            gate_bias=gate_bias,
            up_bias=up_bias,
            **listed(groups),
        )
