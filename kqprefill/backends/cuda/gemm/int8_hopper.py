"""kernels/gemm_int8_sm90.cu: products in int8 on Hopper."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

from ....models.precision import ROTATED
from ..constants import TILE_ROWS
from ..device.arrays import DeviceArray
from ..device.compiler import Program
from ..device.gpu import GpuFacts
from ..device.launcher import Grid, Launches, begun_early
from ..device.signatures import Argument
from ..device.workspace import Workspace
from ..weights.matrix import Matrix
from . import int8_short
from .heads import HeadsKind, HeadsOutput, no_heads
from .int8 import Int8Gemm, Kind, in_fours
from .operand import Groups, Operand, listed, made_into, number_of
from .tensor_maps import TensorMaps
from .tiles import TileConfig, Told, cheapest, row_tiles, side_by_side

_PRODUCER_REGISTERS = 40  # of a thread
_READ = 1.5  # nanoseconds in which an int8 tile is read from memory
# Of an int8 tile: also room behind the ring, for its barriers and the queue of output tiles.
_TILE_BYTES = TILE_ROWS * ROTATED


@dataclass(frozen=True)
class HopperInt8Config(TileConfig):
    """The constants of gemm_int8_sm90.cu, and what a step of ROTATED columns costs.

    gated: 0, as the costs are those of both kernels.
    """

    @cache
    def program(self, kind: Kind, whole: bool = True, heads: HeadsKind | None = None) -> Program:
        """whole: outputs begin in_fours. heads: what outputs become, of q, k and v."""
        of_heads = heads.constants(self) if heads else no_heads(self.epilogue_bytes(kind.gated, kind.grouped))
        stages = self._stages(of_heads["EPILOGUE_BYTES"])
        constants = {
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "BLOCKS": self.blocks,
            "CLUSTER": self.cluster,
            "SHARERS": self.sharers,
            "STEPS": self._steps,
            "STAGES": stages,
            "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
            "CONSUMER_REGISTERS": self.consumer_registers(self.blocks, _PRODUCER_REGISTERS),
            "WHOLE": int(whole),
            **of_heads,
        }
        defines = tuple((name, str(value)) for name, value in constants.items())
        return Program(
            "gemm_int8_sm90.cu",
            (*kind.constants, *defines),
            self.threads,
            stages * self._stage_bytes + _TILE_BYTES + of_heads["EPILOGUE_BYTES"],
        )

    def cost(self, m: int, row_tiles: int, multiprocessors: int, experts: int = 0) -> int:
        """But for few tokens no less than reading the weights takes: then the smallest tiles do."""
        return max(super().cost(m, row_tiles, multiprocessors, experts), round(_READ * row_tiles * max(1, experts)))

    @property
    def begins_early(self) -> bool:
        """Whether launches may begin before the one before has ended, however small they are."""
        return self.blocks == 1 and self.tokens <= 16

    @property
    def _steps(self) -> int:
        """Steps in a stage: more where they are small, so that there is less waiting."""
        return 2 if self.tokens <= 32 else 1

    @property
    def _stage_bytes(self) -> int:
        return self._steps * (self.warpgroups * self.tiles * _TILE_BYTES + self.tokens * ROTATED)

    def _stages(self, epilogue: int) -> int:
        """As many as fit beside an epilogue's bytes, but no more than hide what memory takes."""
        room = self.room(self.blocks) - _TILE_BYTES - epilogue
        return min(16 if self.begins_early else 8, room // self._stage_bytes)


# fmt: off
CONFIGS = (
    #                gated, tokens, warpgroups, tiles, blocks, cluster, alone, shared
    HopperInt8Config(0, 16, 1, 1, 1, 1, 280, 195),
    HopperInt8Config(0, 16, 1, 2, 1, 1, 295, 380),
    HopperInt8Config(0, 16, 1, 1, 2, 1, 290, 200),
    HopperInt8Config(0, 16, 1, 2, 3, 1, 300, 385),
    HopperInt8Config(0, 32, 1, 2, 2, 1, 390, 222),
    HopperInt8Config(0, 64, 1, 2, 3, 1, 447, 250),
    HopperInt8Config(0, 64, 1, 2, 2, 2, 406, 275),
    HopperInt8Config(0, 64, 2, 2, 1, 2, 530, 530),
    HopperInt8Config(0, 128, 1, 2, 2, 1, 600, 335),
    HopperInt8Config(0, 128, 2, 2, 1, 1, 620, 620),
    HopperInt8Config(0, 128, 3, 2, 1, 1, 860, 860),
    HopperInt8Config(0, 256, 2, 2, 1, 2, 960, 960),
)
# fmt: on


@cache
def best_config(m: int, row_tiles: int, gated: bool, multiprocessors: int, experts: int = 0) -> HopperInt8Config:
    """As `cheapest`; gate and up take one of a warpgroup's row tiles each."""
    return cheapest((c for c in CONFIGS if c.tiles == 2 or not gated), m, row_tiles, multiprocessors, experts)


class HopperInt8Gemm(Int8Gemm):
    """With wgmma and the copy engine."""

    def __init__(self, facts: GpuFacts, launcher: Launches, work: Workspace, maps: TensorMaps) -> None:
        super().__init__(facts, launcher, work)
        self._maps = maps

    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        if not gated and int8_short.fits(m, matrices[0], experts):
            return int8_short.group_rows(m, matrices[0], self._facts.multiprocessors)
        return self._config(m, matrices, gated, experts).tokens

    def fullest_first(self, m: int, matrix: Matrix, experts: int) -> bool:
        return int8_short.fits(m, matrix, experts)

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
        experts = number_of(groups)
        if groups is not None and int8_short.fits(x.rows, matrices[0], experts):
            assert out_scale is not None  # as always with groups
            return int8_short.multiply(
                self._launcher, self._maps, self._facts, x, matrices[0], out, bias, groups, out_scale, ldo
            )
        config = self._config(x.rows, matrices, False, experts)
        self._launch(
            config,
            config.program(Kind.linear(groups, out), in_fours(matrices, out, ldo)),
            "gemm_linear",
            grid=config.grid(x.rows, row_tiles(matrices), self._facts.multiprocessors, experts),
            **_described(matrices),
            x_map=self._maps.of(x.values, config.box_rows),
            x_scale=x.scale,
            m=x.rows,
            k=x.values.shape[1],
            out=out,
            ldo=ldo,
            out_scale=out_scale,
            bias=bias,
            add=int(add),
            **listed(groups),
        )

    def heads(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        output: HeadsOutput,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
    ) -> bool:
        config = self._config(a.rows, matrices, False, 0)
        # Blocks that have half a head between them are slower: atoms of their row tiles are brought one by one.
        if output.kind.clustered(config) != config:
            return False
        x = self.rounded(a)
        self._launch(
            config,
            config.program(Kind(), heads=output.kind),
            "gemm_heads",
            grid=config.grid(x.rows, row_tiles(matrices), self._facts.multiprocessors),
            **_described(matrices),
            x_map=self._maps.of(x.values, config.box_rows),
            x_scale=x.scale,
            m=x.rows,
            k=x.values.shape[1],
            bias=bias,
            angle_map=output.angle_map(self._maps, config),
            **output.arguments,
        )
        return True

    def activated(
        self,
        a: Operand,
        matrix: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        activation: str,
    ) -> None:
        x = self.rounded(a)
        config = self._config(x.rows, (matrix,), False, 0)
        self._launch(
            config,
            config.program(Kind(activated=True)),
            "gemm_activated",
            grid=config.grid(x.rows, row_tiles((matrix,)), self._facts.multiprocessors),
            weights=matrix.array,
            w_scales=matrix.scales,
            features=matrix.rows,
            x_map=self._maps.of(x.values, config.box_rows),
            x_scale=x.scale,
            m=x.rows,
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
        x, experts = self.rounded(a), number_of(groups)
        config = self._config(x.rows, (gate, up), True, experts)
        gate_bias, up_bias = biases
        self._launch(
            config,
            config.program(Kind(gated=True, grouped=groups is not None)),
            "gemm_gated",
            grid=config.grid(x.rows, row_tiles((gate, up)), self._facts.multiprocessors, experts),
            gate=gate.array,
            gate_scales=gate.scales,
            up=up.array,
            up_scales=up.scales,
            features=gate.rows,
            x_map=self._maps.of(x.values, config.box_rows),
            x_scale=x.scale,
            m=x.rows,
            k=x.values.shape[1],
            **made_into(act, activation),
            gate_bias=gate_bias,
            up_bias=up_bias,
            **listed(groups),
        )

    def _launch(
        self, config: HopperInt8Config, program: Program, kernel: str, grid: Grid, **arguments: Argument
    ) -> None:
        """Where a block has a multiprocessor for itself, even a small launch may begin early: it still spreads over all
        of them, and brings weights while the operand is made."""
        with begun_early(self._launcher) if config.begins_early else nullcontext():
            self._launcher.launch(program, kernel, grid, **arguments)

    def _config(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> HopperInt8Config:
        return best_config(m, row_tiles(matrices), gated, self._facts.multiprocessors, experts)


def _described(matrices: Sequence[Matrix]) -> dict[str, Told]:
    """What gemm_int8_sm90.cu is told of them: also their rows' scales."""
    return side_by_side(matrices, "scales", [matrix.scales for matrix in matrices], None)
