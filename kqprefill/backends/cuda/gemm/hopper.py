"""kernels/gemm_sm90.cu: W is dequantised inside the kernel, for each output tile anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ....gguf.types import GGML
from ..constants import OPERAND_GROUP, TILE_ROWS
from ..device.arrays import DeviceArray
from ..device.compiler import Program
from ..device.gpu import GpuFacts
from ..device.launcher import Launches
from ..units import unit_size
from ..weights.matrix import Matrix
from .heads import HeadsKind, HeadsOutput, no_heads
from .operand import HALVES, Gemm, Groups, Operand, listed, made_into, number_of
from .tensor_maps import TensorMaps
from .tiles import TileConfig, Told, cheapest, row_tiles, side_by_side

_FEWEST_STAGES = 2
_BARRIERS = 512  # bytes: more than the stages' barriers take
_HEADS_WORTH = 1.1  # times a product of q, k and v; the sums' way through memory takes a fifth of 2048 tokens'
# Of a thread that brings weights: the fewest there can be; where units are of two lengths, or row tiles of heads.
_PRODUCER_REGISTERS, _PRODUCER_REGISTERS_MORE = 24, 32


@dataclass(frozen=True)
class HopperConfig(TileConfig):
    """The constants of gemm_sm90.cu, and what a step of OPERAND_GROUP columns costs (Q4_K)."""

    @cache
    def program(
        self,
        types: tuple[GGML, ...],
        grouped: bool = False,
        activated: bool = False,
        heads: HeadsKind | None = None,
    ) -> Program:
        """For launches over matrices of these ggml types (distinct, in the order of their format numbers).

        grouped: over a stack of experts of one type. activated: of one matrix without a gate, whose outputs go through
        an activation. heads: of q, k and v, whose outputs become such heads.
        """
        of_heads = heads.constants(self) if heads else no_heads(self.epilogue_bytes(bool(self.gated), grouped))
        layout = self._layout(types, of_heads["EPILOGUE_BYTES"])
        spared = len(types) == 1 or self.tokens < 256  # consumers of heads need no more
        more = len({unit_size(t)[0] for t in types}) > 1 or (heads is not None and spared)
        producers = _PRODUCER_REGISTERS_MORE if more else _PRODUCER_REGISTERS
        constants = {
            "GATED": self.gated,
            "ACTIVATED": int(activated),
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "BLOCKS": layout.blocks,
            "CLUSTER": self.cluster,
            "SHARERS": self.sharers,
            "STEPS": self._steps,
            "STAGES": layout.stages,
            "RAW_STAGES": layout.raw_stages,
            "PRODUCER_REGISTERS": producers,
            "CONSUMER_REGISTERS": self.consumer_registers(layout.blocks, producers),
            "FORMATS": ",".join(t.name for t in types),
            "GROUPED": int(grouped),
            **of_heads,
        }
        defines = tuple((name, str(value)) for name, value in constants.items())
        return Program("gemm_sm90.cu", defines, self.threads, layout.shared_bytes)

    def makes_heads(self, types: tuple[GGML, ...], heads: HeadsKind) -> bool:
        """Whether a block has shared memory enough for such a program."""
        return self._layout(types, heads.shared_bytes(self)).stages >= _FEWEST_STAGES

    @property
    def _steps(self) -> int:
        """Steps in a stage of x: a whole unit's where they are small, so that there is less waiting."""
        return max(1, min(4, (256 if self.warpgroups > 1 else 128) // self.tokens))

    def _layout(self, types: tuple[GGML, ...], epilogue: int) -> _Layout:
        """As many blocks of a multiprocessor, and stages of each, as fit its shared memory; epilogue: bytes that it
        takes."""
        unit = min(unit_size(t)[0] for t in types)
        raw = self.warpgroups * self.tiles * TILE_ROWS * max(unit_size(t)[1] for t in types)
        steps = min(self._steps, unit // OPERAND_GROUP)
        x, stages_of_unit = steps * self.tokens * 2 * OPERAND_GROUP, unit // OPERAND_GROUP // steps
        for blocks in range(self.blocks, 0, -1):  # fewer where units are large
            room = self.room(blocks) - _BARRIERS - epilogue
            raw_stages = max(2, min(8, room // (raw + stages_of_unit * x)))
            stages = min(raw_stages * stages_of_unit, (room - raw_stages * raw) // x)
            if stages >= _FEWEST_STAGES:
                break
        return _Layout(blocks, stages, raw_stages, stages * x + raw_stages * raw + _BARRIERS + epilogue)


@dataclass(frozen=True)
class _Layout:
    """Blocks on a multiprocessor; stages of x and of quantised tiles, and bytes of shared memory, of each."""

    blocks: int
    stages: int
    raw_stages: int
    shared_bytes: int


# fmt: off
CONFIGS = (
    #       gated, tokens, warpgroups, tiles, blocks, cluster, alone, shared
    HopperConfig(0, 16, 1, 1, 4, 1, 146, 105),
    HopperConfig(0, 16, 1, 2, 3, 1, 178, 160),
    HopperConfig(0, 32, 1, 1, 3, 1, 157, 135),
    HopperConfig(0, 32, 1, 2, 3, 1, 200, 180),
    HopperConfig(0, 64, 1, 1, 3, 1, 185, 149),
    HopperConfig(0, 64, 1, 2, 2, 1, 215, 195),
    HopperConfig(0, 128, 1, 1, 2, 1, 236, 199),
    HopperConfig(0, 128, 1, 2, 2, 1, 266, 259),
    HopperConfig(0, 128, 2, 2, 1, 1, 440, 440),
    HopperConfig(0, 256, 2, 2, 1, 2, 700, 700),
    HopperConfig(1, 16, 1, 2, 3, 1, 178, 154),
    HopperConfig(1, 32, 1, 2, 3, 1, 200, 160),
    HopperConfig(1, 64, 1, 2, 3, 1, 215, 181),
    HopperConfig(1, 128, 1, 2, 2, 1, 330, 253),
    HopperConfig(1, 128, 2, 2, 1, 1, 410, 410),
    HopperConfig(1, 256, 2, 2, 1, 2, 740, 740),
)
# fmt: on
# Those whose blocks may make heads: also one for some 512 tokens, which fills more multiprocessors than larger ones.
HEADS_CONFIGS = (*(config for config in CONFIGS if not config.gated), HopperConfig(0, 128, 3, 2, 1, 1, 600, 600))


@cache
def best_config(m: int, row_tiles: int, gated: bool, multiprocessors: int, experts: int = 0) -> HopperConfig:
    """As `cheapest`, of those for one matrix, or for gate and up."""
    return cheapest((c for c in CONFIGS if bool(c.gated) == gated), m, row_tiles, multiprocessors, experts)


@cache
def heads_config(
    m: int, row_tiles: int, types: tuple[GGML, ...], kind: HeadsKind, multiprocessors: int
) -> HopperConfig | None:
    """The cheapest whose blocks make whole heads of matrices of these types; None where others are so much cheaper that
    sums may as well pass through memory."""
    sizes = m, row_tiles, multiprocessors
    whole = [kind.clustered(config) for config in HEADS_CONFIGS]
    own = cheapest((config for config in whole if config and config.makes_heads(types, kind)), *sizes, 0)
    others = best_config(m, row_tiles, False, multiprocessors)
    return own if own.cost(*sizes) <= _HEADS_WORTH * others.cost(*sizes) else None


class HopperGemm(Gemm):
    """One fused pass."""

    def __init__(self, facts: GpuFacts, launcher: Launches, maps: TensorMaps) -> None:
        self._facts, self._launcher, self._maps = facts, launcher, maps

    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        return self._config(m, matrices, gated, experts).tokens

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
        config = self._config(a.rows, matrices, False, number_of(groups))
        self._launcher.launch(
            config.program(_types(matrices), groups is not None),
            "gemm_linear",
            grid=self._grid(config, a.rows, matrices, groups),
            **_described(matrices),
            x_map=self._map(a, config),
            m=a.rows,
            k=a.columns,
            out=out,
            ldo=ldo or sum(matrix.rows for matrix in matrices),
            x_scale=a.scale,
            w_scale=weight_scale,
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
        config = heads_config(a.rows, row_tiles(matrices), _types(matrices), output.kind, self._facts.multiprocessors)
        if config is None:
            return False
        self._launcher.launch(
            config.program(_types(matrices), heads=output.kind),
            "gemm_heads",
            grid=self._grid(config, a.rows, matrices, None),
            **_described(matrices),
            x_map=self._map(a, config),
            m=a.rows,
            k=a.columns,
            x_scale=a.scale,
            w_scale=weight_scale,
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
        config = self._config(a.rows, (matrix,), False, 0)
        self._launcher.launch(
            config.program((matrix.type,), activated=True),
            "gemm_activated",
            grid=self._grid(config, a.rows, (matrix,), None),
            weights=matrix.array,
            features=matrix.rows,
            x_map=self._map(a, config),
            m=a.rows,
            k=a.columns,
            **made_into(act, activation),
            x_scale=a.scale,
            w_scale=weight_scale,
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
        config = self._config(a.rows, (gate, up), True, number_of(groups))
        gate_bias, up_bias = biases
        self._launcher.launch(
            config.program(_types((gate, up)), groups is not None),
            "gemm_gated",
            grid=self._grid(config, a.rows, (gate, up), groups),
            gate=gate.array,
            up=up.array,
            features=gate.rows,
            x_map=self._map(a, config),
            m=a.rows,
            k=a.columns,
            **made_into(act, activation),
            x_scale=a.scale,
            w_scale=weight_scale,
            gate_bias=gate_bias,
            up_bias=up_bias,
            **listed(groups),
        )

    def _map(self, a: Operand, config: HopperConfig) -> DeviceArray:
        """The operand's tensor map."""
        assert a.format is HALVES, "this norm's output was to be read by matrices in int8 alone"
        return self._maps.of(a.values, config.box_rows)

    def _config(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> HopperConfig:
        return best_config(m, row_tiles(matrices), gated, self._facts.multiprocessors, experts)

    def _grid(self, config: HopperConfig, m: int, matrices: Sequence[Matrix], groups: Groups | None) -> int:
        return config.grid(m, row_tiles(matrices), self._facts.multiprocessors, number_of(groups))


def _types(matrices: Sequence[Matrix]) -> tuple[GGML, ...]:
    """The distinct ggml types of matrices: what gemm_sm90.cu is compiled for. A type's place is its number there."""
    return tuple(dict.fromkeys(matrix.type for matrix in matrices))


def _described(matrices: Sequence[Matrix]) -> dict[str, Told]:
    """What gemm_sm90.cu is told of them: also their formats' numbers."""
    types = _types(matrices)
    return side_by_side(matrices, "format", [types.index(matrix.type) for matrix in matrices], 0)
