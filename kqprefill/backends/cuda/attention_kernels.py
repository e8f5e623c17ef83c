"""The shapes that blocks of the attention kernels take, by the sizes of heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

from ...core import LARGEST_KEY_BLOCK
from ...errors import ModelError
from .constants import MAX_HEAD_DIM
from .device.compiler import Program

_MOST_PART = 256  # columns of a head's output that the registers of a block's threads hold


@dataclass(frozen=True)
class AttentionConfig(ABC):
    """The constants of one attention kernel.

    head_dim, value_dim: of q and k, and of v, in memory, padded. block_kv: keys that are walked at a time.
    """

    head_dim: int
    value_dim: int
    block_kv: int

    def __post_init__(self) -> None:
        if self.block_kv > LARGEST_KEY_BLOCK:
            raise ValueError(f"blocks of {self.block_kv} keys: those who pack batches count on {LARGEST_KEY_BLOCK}")

    @property
    @abstractmethod
    def block_q(self) -> int:
        """Queries of a tile."""

    @abstractmethod
    def program(self, both_ways: bool = False, sharers: int = 1) -> Program:
        """What it is compiled to; both_ways: for queries that also see the keys after them; sharers: see `sharers`."""

    def sharers(self, nq: int, nkv: int, tiles: int, multiprocessors: int) -> int:
        """How many heads' blocks bring keys and values for one another, of so many heads and tiles of queries."""
        return 1

    @property
    def uses_tensor_maps(self) -> bool:
        """Whether q, k and v are given as tensor maps."""
        return False

    @property
    def part_dim(self) -> int:
        """Columns of a head's output that a block makes."""
        return self.value_dim // self.parts

    @property
    def parts(self) -> int:
        """Blocks that share the work on one tile of queries of one head."""
        return -(-self.value_dim // _MOST_PART)

    def _program(self, source: str, threads: int, shared_bytes: int, both_ways: bool, **constants: int) -> Program:
        """The kernel's program, with the constants that both sources have, and others."""
        every = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "PART_DIM": self.part_dim,
            "BLOCK_KV": self.block_kv,
            "BOTH_WAYS": int(both_ways),
            **constants,
        }
        defines = tuple((name, str(value)) for name, value in every.items())
        return Program(source, defines, threads, shared_bytes)


@dataclass(frozen=True)
class PortableAttention(AttentionConfig):
    """attention_sm80.cu: head_dim and value_dim are multiples of 16; a warp has 16 queries."""

    warps: int
    q_in_registers: int

    @property
    def block_q(self) -> int:
        return 16 * self.warps

    @cache
    def program(self, both_ways: bool = False, sharers: int = 1) -> Program:
        key_row, value_row = 2 * self.head_dim + 16, 2 * self.part_dim + 16
        query_rows = 0 if self.q_in_registers else self.block_q
        shared_bytes = 2 * self.block_kv * (key_row + value_row) + query_rows * key_row
        constants = {"WARPS": self.warps, "Q_IN_REGISTERS": self.q_in_registers}
        return self._program("attention_sm80.cu", 32 * self.warps, shared_bytes, both_ways, **constants)


@dataclass(frozen=True)
class HopperAttention(AttentionConfig):
    """attention_sm90.cu: head_dim and value_dim are multiples of 64; two warpgroups have 64 queries each, another
    brings keys."""

    stages: int

    @property
    def block_q(self) -> int:
        return 128

    @cache
    def program(self, both_ways: bool = False, sharers: int = 1) -> Program:
        halves = self.block_q * self.head_dim + self.stages * self.block_kv * (self.head_dim + self.part_dim)
        barriers = 1 + 4 * self.stages
        constants = {"STAGES": self.stages, "CLUSTER": sharers}
        return self._program("attention_sm90.cu", 384, 2 * halves + 8 * barriers, both_ways, **constants)

    @property
    def uses_tensor_maps(self) -> bool:
        return True

    def sharers(self, nq: int, nkv: int, tiles: int, multiprocessors: int) -> int:
        """Two where there are blocks enough: less comes from the L2 cache, which saves energy, but two wait for each
        other."""
        return 2 if nq // nkv % 2 == 0 and nq * tiles * self.parts >= 2 * multiprocessors else 1


_HOPPER = {
    (config.head_dim, config.value_dim): config
    for config in (
        HopperAttention(64, 64, 128, 4),
        HopperAttention(128, 128, 128, 2),
        HopperAttention(192, 128, 128, 2),
        HopperAttention(256, 256, 64, 2),
        HopperAttention(512, 512, 32, 2),
    )
}


def padded_head(head_dim: int) -> int:
    """Values from one head of q, k or v to the next: of each part that a block makes, a multiple of 16.

    Raises ModelError for heads that are too wide, or of an odd size: outputs are written in pairs.
    """
    multiple = 16 if head_dim <= _MOST_PART else 32
    padded = -(-head_dim // multiple) * multiple
    if padded > MAX_HEAD_DIM:
        raise ModelError(f"heads of {head_dim} are not supported on CUDA (at most {MAX_HEAD_DIM}); use --backend cpu")
    if head_dim % 2:
        raise ModelError(f"heads of {head_dim}, an odd number, are not supported on CUDA; use --backend cpu")
    return padded


@cache
def portable_attention(head_dim: int, value_dim: int) -> AttentionConfig:
    """The kernel of every GPU, for heads with keys and values of so many elements."""
    key, value = padded_head(head_dim), padded_head(value_dim)
    if max(key, value) <= 128:
        return PortableAttention(key, value, 64, 8, 1)
    if max(key, value) <= 256:
        return PortableAttention(key, value, 32, 4, 0)
    return PortableAttention(key, value, 16, 2, 0)


@cache
def hopper_attention(head_dim: int, value_dim: int) -> AttentionConfig:
    """Hopper's own kernel where it knows such heads, else that of every GPU."""
    return _HOPPER.get((head_dim, value_dim)) or portable_attention(head_dim, value_dim)
