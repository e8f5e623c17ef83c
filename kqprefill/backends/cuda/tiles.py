"""The shapes that GEMM and attention blocks may take, and which one serves a product: the one place where that is chosen."""

from dataclasses import dataclass, fields
from functools import cache, cached_property

from ...errors import ModelError
from ...gguf.types import GGML_QUANT_SIZES
from .compiler import Program

LARGEST_HEAD = 256  # rope.cu and the attention kernels
TILE_ROWS = 32  # kernels/quants/common.cuh
K_MULTIPLE = 64  # operands are zero-padded to this many columns, a GEMM's step: every tile's K divides it


def padded(columns):
    """Halves from one operand row to the next."""
    return -(-columns // K_MULTIPLE) * K_MULTIPLE


class _Constants:
    """A tile whose fields are the constants that its kernel is compiled with."""

    @cached_property
    def constants(self):
        return tuple((f.name.upper(), str(getattr(self, f.name))) for f in fields(self))

    @cached_property
    def program(self):
        return Program(self.source, self.constants)


@dataclass(frozen=True)
class GemmTile(_Constants):
    """The constants of gemm_sm80.cu."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int
    source = "gemm_sm80.cu"

    @cache
    def program(self, grouped=False):
        """grouped: over a stack of experts."""
        return Program(self.source, (*self.constants, ("GROUPED", str(int(grouped)))))

    @property
    def threads(self):
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self):
        return self.stages * (self.block_m + self.block_n) * self.block_k * 2

    def tiles(self, m, n, experts=0):
        """experts: of which each has some of the m rows (an estimate)."""
        return (-(-m // self.block_m) + experts // 2) * -(-n // self.block_n)

    def grid(self, m, n, multiprocessors, experts=0):
        """Blocks to launch: of the large tiles as many as run at once, each of which makes several."""
        tiles = self.tiles(m, n, 2 * experts)
        if self is SMALL_TILE:
            return min(tiles, 4 * multiprocessors) if experts else tiles
        return min(tiles, multiprocessors)


#                     M    N    K  stages warps
LARGE_TILES = [
    GemmTile(128, 256, 64, 3, 2, 4),  # 144 KB: an H100's, 3% faster than the next
    GemmTile(128, 256, 32, 4, 2, 4),  # the 99 KB that a block of sm_86, sm_89 or sm_120 may have
]
SMALL_TILE = GemmTile(64, 64, 64, 5, 2, 2)


@dataclass(frozen=True)
class HopperTile:
    """The constants of gemm_sm90.cu, and what a step of 64 columns costs.

    A block has `warpgroups` that multiply `tiles` row tiles of TILE_ROWS rows each (gated: of gate and of up) by `tokens`
    tokens; `blocks` of them share a multiprocessor; a `cluster` of them shares the tokens that it brings. alone, shared:
    nanoseconds of a step of a block by itself, and those that each block adds where several share a multiprocessor
    (an H100, Q4_K: .ci/tile_costs.py).
    """

    gated: int
    tokens: int
    warpgroups: int
    tiles: int
    blocks: int
    cluster: int
    alone: int
    shared: int

    @cache
    def program(self, types, grouped=False):
        """The program for launches over matrices of these ggml types (distinct, in the order of their format numbers); grouped:
        over a stack of experts of one type."""
        blocks, stages, raw_stages, _ = self._layout(types)
        constants = {
            "GATED": self.gated,
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "BLOCKS": blocks,
            "CLUSTER": self.cluster,
            "STEPS": self._steps(),
            "STAGES": stages,
            "RAW_STAGES": raw_stages,
            "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
            "CONSUMER_REGISTERS": self._consumer_registers(blocks),
            "FORMATS": ",".join(t.name for t in types),
            "GROUPED": int(grouped),
        }
        return Program("gemm_sm90.cu", tuple((name, str(value)) for name, value in constants.items()))

    @property
    def threads(self):
        return 128 * (self.warpgroups + 1)

    def shared_bytes(self, types):
        return self._layout(types)[-1]

    def grid(self, m, row_tiles, multiprocessors, experts=0):
        """Blocks to launch: as many as run at once, or fewer where there are fewer tiles."""
        return min(multiprocessors * self.blocks // self.cluster * self.cluster, self._count(m, row_tiles, 2 * experts))

    def cost(self, m, row_tiles, multiprocessors, experts=0):
        """Nanoseconds of a step of all tiles; experts: of which each has some of the m rows."""
        rounds = -(-self._count(m, row_tiles, experts) // multiprocessors)  # of one tile for each multiprocessor
        return max(-(-rounds // self.blocks) * self.alone, rounds * self.shared)

    def _count(self, m, row_tiles, experts):
        """Blocks' tiles, in whole clusters. Each expert's last tile is half full, at a guess."""
        return (
            (-(-m // self.tokens) + experts // 2)
            * -(-row_tiles // (self.warpgroups * self.tiles * self.cluster))
            * self.cluster
        )

    def _steps(self):
        """Steps in a stage of x: a whole unit's where they are small, so that there is less waiting."""
        return max(1, min(4, 128 // self.tokens))

    def _consumer_registers(self, blocks):
        """Of each thread: all that the blocks of a multiprocessor may have, less the producers'."""
        launched = 65536 // (self.threads * blocks) // 8 * 8
        return (launched * (self.warpgroups + 1) - _PRODUCER_REGISTERS) // self.warpgroups // 8 * 8

    @cache
    def _layout(self, types):
        """(blocks on a multiprocessor, stages of x, raw stages, bytes of shared memory): as many as fit."""
        unit = unit_size(types[0])[0]
        raw = self.warpgroups * self.tiles * TILE_ROWS * max(unit_size(t)[1] for t in types)
        steps = min(self._steps(), unit // K_MULTIPLE)
        x, stages_of_unit = steps * self.tokens * 2 * K_MULTIPLE, unit // K_MULTIPLE // steps
        for blocks in range(self.blocks, 0, -1):  # fewer where units are large
            room = (_SHARED_MEMORY >> 10) // blocks * 1024 - 1024 - _BARRIERS
            raw_stages = max(2, min(8, room // (raw + stages_of_unit * x)))
            stages = min(raw_stages * stages_of_unit, (room - raw_stages * raw) // x)
            if stages >= 2:
                break
        return blocks, stages, raw_stages, stages * x + raw_stages * raw + _BARRIERS


_PRODUCER_REGISTERS = 24  # the fewest there can be
_BARRIERS = 512  # bytes: more than the stages' barriers take
_SHARED_MEMORY = 228 << 10  # of a multiprocessor of compute capability 9.0; each block takes 1 KB of it besides its own

HOPPER_TILES = [
    #          gated, tokens, warpgroups, tiles, blocks, cluster, alone, shared
    HopperTile(0, 16, 1, 1, 4, 1, 146, 105),
    HopperTile(0, 16, 1, 2, 3, 1, 178, 160),
    HopperTile(0, 32, 1, 1, 3, 1, 157, 135),
    HopperTile(0, 32, 1, 2, 3, 1, 200, 180),
    HopperTile(0, 64, 1, 1, 3, 1, 185, 149),
    HopperTile(0, 64, 1, 2, 2, 1, 215, 195),
    HopperTile(0, 128, 1, 1, 2, 1, 236, 199),
    HopperTile(0, 128, 1, 2, 2, 1, 266, 259),
    HopperTile(0, 128, 2, 2, 1, 1, 473, 473),
    HopperTile(0, 256, 2, 2, 1, 2, 700, 700),
    HopperTile(1, 16, 1, 2, 3, 1, 178, 154),
    HopperTile(1, 32, 1, 2, 3, 1, 200, 160),
    HopperTile(1, 64, 1, 2, 3, 1, 215, 181),
    HopperTile(1, 128, 1, 2, 2, 1, 330, 253),
    HopperTile(1, 128, 2, 2, 1, 1, 469, 469),
    HopperTile(1, 256, 2, 2, 1, 2, 740, 740),
]


@cache
def choose_hopper_tile(m, row_tiles, gated, multiprocessors, experts=0):
    """The cheapest tile for m tokens by that many row tiles of W, or of each of so many experts' W."""
    return min(
        (tile for tile in HOPPER_TILES if tile.gated == gated),
        key=lambda tile: tile.cost(m, row_tiles, multiprocessors, experts),
    )


def unit_size(ggml_type):
    """(weights, bytes) of a unit of kernels/quants/: what a row's columns are padded to in device memory."""
    elements, nbytes = GGML_QUANT_SIZES[ggml_type]
    unit = 128 if elements == 1 else 256
    return unit, unit // elements * nbytes


def repack_units(ggml_type):
    """Units of each row that a block of weights.cu's repack takes: within 48 KB of shared memory."""
    return {0: 4, 1: 2}.get((unit_size(ggml_type)[1] - 1) // 256, 1)


def large_tile(shared_memory):
    """The first of LARGE_TILES that a block which may have this much shared memory (bytes) can run."""
    return next(tile for tile in LARGE_TILES if tile.shared_bytes <= shared_memory)


def choose_gemm_tile(m, n, gpu, experts=0):
    """The large tile does twice the work for each byte it loads; the small one where large ones leave the GPU idle."""
    large = large_tile(gpu.shared_memory)
    return large if large.tiles(m, n, experts) >= gpu.multiprocessors * 3 // 4 else SMALL_TILE


@dataclass(frozen=True)
class AttentionTile(_Constants):
    """The constants of attention_sm80.cu for one head dimension (padded to a multiple of 16)."""

    head_dim: int
    block_kv: int
    warps: int
    q_in_registers: int
    source = "attention_sm80.cu"

    @property
    def threads(self):
        return 32 * self.warps

    @property
    def block_q(self):
        return 16 * self.warps

    @property
    def shared_bytes(self):
        rows = 4 * self.block_kv + (0 if self.q_in_registers else self.block_q)
        return rows * (2 * self.head_dim + 16)


@dataclass(frozen=True)
class HopperAttentionTile(_Constants):
    """The constants of attention_sm90.cu for one head dimension."""

    head_dim: int
    block_kv: int
    stages: int
    source = "attention_sm90.cu"
    block_q = 128
    threads = 384

    @property
    def shared_bytes(self):
        return (self.block_q + 2 * self.stages * self.block_kv) * 2 * self.head_dim + 8 * (1 + 4 * self.stages)


HOPPER_ATTENTION_TILES = {
    64: HopperAttentionTile(64, 128, 4),
    128: HopperAttentionTile(128, 128, 2),
    256: HopperAttentionTile(256, 64, 2),
}


def padded_head(head_dim):
    """Values from one head of q, k and v to the next. Raises ModelError for heads that are too wide."""
    padded = -(-head_dim // 16) * 16
    if padded > LARGEST_HEAD:
        raise ModelError(f"heads of {head_dim} are not supported on CUDA (at most {LARGEST_HEAD}); use --backend cpu")
    return padded


@cache
def attention_tile(head_dim, hopper):
    """The kernel for such heads: Hopper's own where it knows them."""
    padded = padded_head(head_dim)
    if hopper and padded in HOPPER_ATTENTION_TILES:
        return HOPPER_ATTENTION_TILES[padded]
    return AttentionTile(padded, 64, 8, 1) if padded <= 128 else AttentionTile(padded, 32, 4, 0)
