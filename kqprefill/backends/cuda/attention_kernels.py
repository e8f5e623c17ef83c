"""The shapes that blocks of the attention kernels take, by head dimension."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

from ...core import LARGEST_KEY_BLOCK
from ...errors import ModelError
from .constants import MAX_HEAD_DIM
from .device.compiler import Program


@dataclass(frozen=True)
class AttentionConfig(ABC):
    """The constants of one attention kernel.

    head_dim: of q, k and v in memory, padded. block_kv: keys that are walked at a time.
    """

    head_dim: int
    block_kv: int

    def __post_init__(self) -> None:
        if self.block_kv > LARGEST_KEY_BLOCK:
            raise ValueError(f"blocks of {self.block_kv} keys: those who pack batches count on {LARGEST_KEY_BLOCK}")

    @property
    @abstractmethod
    def block_q(self) -> int:
        """Queries of a tile."""

    @property
    @abstractmethod
    def program(self) -> Program:
        """What it is compiled to."""

    @property
    def uses_tensor_maps(self) -> bool:
        """Whether q, k and v are given as tensor maps."""
        return False


@dataclass(frozen=True)
class PortableAttention(AttentionConfig):
    """attention_sm80.cu: head_dim is a multiple of 16; a warp has 16 queries."""

    warps: int
    q_in_registers: int

    @property
    def block_q(self) -> int:
        return 16 * self.warps

    @property
    @cache
    def program(self) -> Program:
        rows = 4 * self.block_kv + (0 if self.q_in_registers else self.block_q)
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_KV": self.block_kv,
            "WARPS": self.warps,
            "Q_IN_REGISTERS": self.q_in_registers,
        }
        defines = tuple((name, str(value)) for name, value in constants.items())
        return Program("attention_sm80.cu", defines, 32 * self.warps, rows * (2 * self.head_dim + 16))


@dataclass(frozen=True)
class HopperAttention(AttentionConfig):
    """attention_sm90.cu: head_dim is a multiple of 64; two warpgroups have 64 queries each, another brings keys."""

    stages: int

    @property
    def block_q(self) -> int:
        return 128

    @property
    @cache
    def program(self) -> Program:
        constants = {"HEAD_DIM": self.head_dim, "BLOCK_KV": self.block_kv, "STAGES": self.stages}
        defines = tuple((name, str(value)) for name, value in constants.items())
        rows, barriers = self.block_q + 2 * self.stages * self.block_kv, 1 + 4 * self.stages
        return Program("attention_sm90.cu", defines, 384, rows * 2 * self.head_dim + 8 * barriers)

    @property
    def uses_tensor_maps(self) -> bool:
        return True


_HOPPER = {
    config.head_dim: config
    for config in (HopperAttention(64, 128, 4), HopperAttention(128, 128, 2), HopperAttention(256, 64, 2))
}


def padded_head(head_dim: int) -> int:
    """Values from one head of q, k and v to the next. Raises ModelError for heads that are too wide."""
    padded = -(-head_dim // 16) * 16
    if padded > MAX_HEAD_DIM:
        raise ModelError(f"heads of {head_dim} are not supported on CUDA (at most {MAX_HEAD_DIM}); use --backend cpu")
    return padded


@cache
def portable_attention(head_dim: int) -> AttentionConfig:
    """The kernel of every GPU, for heads of that many values."""
    padded = padded_head(head_dim)
    return PortableAttention(padded, 64, 8, 1) if padded <= 128 else PortableAttention(padded, 32, 4, 0)


@cache
def hopper_attention(head_dim: int) -> AttentionConfig:
    """Hopper's own kernel where it knows such heads, else that of every GPU."""
    return _HOPPER.get(padded_head(head_dim)) or portable_attention(head_dim)
