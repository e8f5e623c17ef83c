"""Queries, keys and values, by head, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass

from ....models.config import Rope
from ....models.weights import Weight
from ..device.arrays import DeviceArray
from ..gemm.heads import HeadsKind


@dataclass(frozen=True)
class Heads:
    """q, k or v: halves [rows, heads, head_dim padded (attention_kernels.py)], holding values times *scale."""

    values: DeviceArray
    scale: DeviceArray
    head_dim: int

    @property
    def matrix(self) -> DeviceArray:
        """The values as [rows, heads * padded head_dim]."""
        rows, heads, dim = self.values.shape
        return DeviceArray(self.values.address, self.values.dtype, (rows, heads * dim))


@dataclass(frozen=True)
class HeadProducts:
    """What q, k and v of a layer are made of: products of `weights` side by side, q's columns first.

    nq, nkv: heads; nkv is 0 where there are queries only. gated: whether each head of q is followed by as many gates.
    v_is_k: whether v has no columns of its own, and is made of k's.
    """

    weights: list[Weight]
    nq: int
    nkv: int
    head_dim: int
    gated: bool
    v_is_k: bool
    q_norm: Weight | None
    k_norm: Weight | None
    v_normed: bool
    rope: Rope | None
    normed_last: bool = False

    @property
    def q_width(self) -> int:
        """Columns of q without its gates."""
        return self.nq * self.head_dim

    @property
    def is_usual(self) -> bool:
        """Whether rotate_qkv does it (kernels/rope.cu); else rotate_and_norm does, which is slower."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        offset = self.rope.beta_offset if self.rope is not None else 0
        return not (self.normed_last or offset or any(len(norm.shape) == 2 for norm in norms))

    @property
    def kind(self) -> HeadsKind | None:
        """How the products themselves may make heads of their sums; None where they do not."""
        rope, normed = self.rope, self.q_norm is not None
        pairs, beta = (rope.width // 2, rope.beta) if rope is not None else (0, 0.0)
        if not self.is_usual or self.gated or self.v_is_k or self.v_normed or beta:
            return None
        if 2 * pairs not in (0, self.head_dim) or self.by_head != [self.q_norm, self.k_norm]:
            return None
        if self.nkv and normed != (self.k_norm is not None):
            return None
        kind = HeadsKind(self.head_dim, normed, rope is not None and pairs > 0 and rope.interleaved)
        return kind if kind.is_known else None

    @property
    def by_head(self) -> list[Weight | None]:
        """The norms of q and k that are over each head alone."""
        return [n if n is not None and n.shape == (self.head_dim,) else None for n in (self.q_norm, self.k_norm)]
