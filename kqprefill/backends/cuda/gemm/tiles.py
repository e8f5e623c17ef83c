"""Kernels for Hopper whose blocks multiply row tiles of W by token tiles, one after another: their configurations, what
these cost, and which is the cheapest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from ..device.arrays import DeviceArray
from ..weights.matrix import Matrix

_REGISTERS = 65536  # of a multiprocessor
_MOST_REGISTERS = 248  # of a thread, in eights
# Of shared memory, in kernels/include/token_rows.cuh: of a staged token of a warpgroup; TokenRows' two stages of 16 of
# them; OperandRows' of a block.
STAGED_TOKEN_BYTES = 128
TOKEN_ROWS_BYTES, _OPERAND_ROWS_BYTES = 2 * 16 * STAGED_TOKEN_BYTES, 8192
_SHARED_MEMORY = 228 << 10  # of a multiprocessor of compute capability 9.0; each block takes 1 KB of it besides its own


@dataclass(frozen=True)
class TileConfig:
    """A block has `warpgroups` that multiply `tiles` row tiles of TILE_ROWS rows each (gated: of gate and of up) by
    `tokens` tokens; `blocks` of them share a multiprocessor; a `cluster` of them has the same tokens.

    alone, shared: nanoseconds of a step of a block by itself, and those that each block adds where several share a
    multiprocessor (an H100: tests/bench/tile_costs.py).
    """

    gated: int
    tokens: int
    warpgroups: int
    tiles: int
    blocks: int
    cluster: int
    alone: int
    shared: int

    @property
    def sharers(self) -> int:
        """Blocks of a cluster that share the tokens that they bring. Of 128 tokens each brings its own: to wait for one
        another costs more than the L2 cache's bytes."""
        return 1 if self.tokens == 128 else self.cluster

    @property
    def box_rows(self) -> int:
        """Tokens that a block brings at a time: rows of a box of the operand's tensor map."""
        return self.tokens // self.sharers

    def epilogue_bytes(self, gated: bool, grouped: bool) -> int:
        """Of shared memory through which a block's outputs leave (kernels/include/token_rows.cuh): those of gate and up
        where two warpgroups have a group of features; of other products those of experts."""
        if gated:
            return _OPERAND_ROWS_BYTES if self.warpgroups == 2 else 0
        return self.warpgroups * TOKEN_ROWS_BYTES if grouped else 0

    @property
    def threads(self) -> int:
        """Of a block: the consumers' warpgroups and one of producers."""
        return 128 * (self.warpgroups + 1)

    def grid(self, m: int, row_tiles: int, multiprocessors: int, experts: int = 0) -> int:
        """Blocks to launch: as many as run at once, or fewer where there are fewer output tiles."""
        at_once = multiprocessors * self.blocks // self.cluster * self.cluster
        return min(at_once, self.output_tiles(m, row_tiles, experts))

    def cost(self, m: int, row_tiles: int, multiprocessors: int, experts: int = 0) -> int:
        """Nanoseconds of a step of all output tiles; experts: of which each has some of the m rows."""
        more = round(experts * self._last_tile)
        rounds = -(-self.output_tiles(m, row_tiles, more) // multiprocessors)  # of one for each multiprocessor
        return max(-(-rounds // self.blocks) * self.alone, rounds * self.shared)

    def output_tiles(self, m: int, row_tiles: int, more: int) -> int:
        """In whole clusters; more: token tiles beyond those that m tokens fill."""
        row_tiles_a_cluster = self.warpgroups * self.tiles * self.cluster
        return (-(-m // self.tokens) + more) * -(-row_tiles // row_tiles_a_cluster) * self.cluster

    @property
    def _last_tile(self) -> float:
        """What an expert's last token tile costs beyond the tokens in it, in whole ones: it is half full, at a guess,
        and most kernels multiply fewer tokens then (gemm_sm90.cu: multiply_tile)."""
        return 0.3 if self.gated or self.tokens < 256 else 0.5

    def consumer_registers(self, blocks: int, of_producers: int) -> int:
        """Of each thread: all that the blocks of a multiprocessor may have, less the producers'."""
        launched = _REGISTERS // (self.threads * blocks) // 8 * 8
        own = (launched * (self.warpgroups + 1) - of_producers) // self.warpgroups // 8 * 8
        return min(own, _MOST_REGISTERS)

    @staticmethod
    def room(blocks: int) -> int:
        """Bytes of shared memory of a block, where so many share a multiprocessor."""
        return (_SHARED_MEMORY >> 10) // blocks * 1024 - 1024


_Config = TypeVar("_Config", bound=TileConfig)
Told: TypeAlias = DeviceArray | int | None


def cheapest(configs: Iterable[_Config], m: int, row_tiles: int, multiprocessors: int, experts: int) -> _Config:
    """The cheapest of these for m tokens by that many row tiles of W, or of each of so many experts' W."""
    return min(configs, key=lambda config: config.cost(m, row_tiles, multiprocessors, experts))


def side_by_side(matrices: Sequence[Matrix], name: str, of_each: Sequence[Told], none: Told) -> dict[str, Told]:
    """What kernels are told of up to three matrices, one under another, by their parameters' names: their tiles, their
    rows, and `name`, of which each has its own; none: where there is no matrix."""
    told: dict[str, Told] = {}
    for i in range(3):
        matrix = matrices[i] if i < len(matrices) else None
        told[f"w{i}"] = matrix.array if matrix else None
        told[f"rows{i}"] = matrix.rows if matrix else 0
        told[f"{name}{i}"] = of_each[i] if matrix else none
    return told


def row_tiles(matrices: Sequence[Matrix]) -> int:
    """Of all of them."""
    return sum(matrix.row_tiles for matrix in matrices)
