"""Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are made of one short row a token."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Latent
from .config import ArchMetadata
from .weights import Shapes, Weight, Weights


@dataclass(frozen=True)
class LatentAttention:
    """The sizes of such a layer.

    rank: of the row that keys and values are made of. query_rank: of that which queries are made of; 0 where they are
    made of the layer's input. key_dim: elements of a head's query and key that are not rotated; `rotary` more are, of
    which the key's are the same in all heads. value_dim: of a head's value. joined: whether a file has the matrices of
    keys and values as one (attn_kv_b, as older converters wrote it), or attn_k_b and attn_v_b.
    """

    heads: int
    rank: int
    query_rank: int
    key_dim: int
    rotary: int
    value_dim: int
    joined: bool

    @classmethod
    def from_gguf(cls, meta: ArchMetadata) -> LatentAttention:
        """Raises ModelError for sizes that contradict."""
        joined = not (meta.has("attention.key_length_mla") and meta.has("attention.value_length_mla"))
        suffix = "" if joined else "_mla"
        key, rotary = meta.integer(f"attention.key_length{suffix}"), meta.integer("rope.dimension_count")
        if rotary >= key:
            raise meta.error(f"rope.dimension_count {rotary} leaves nothing of attention.key_length{suffix} {key}")
        return cls(
            heads=meta.integer("attention.head_count"),
            rank=meta.integer("attention.kv_lora_rank"),
            query_rank=meta.count("attention.q_lora_rank"),
            key_dim=key - rotary,
            rotary=rotary,
            value_dim=meta.integer(f"attention.value_length{suffix}"),
            joined=joined,
        )

    @property
    def head_dim(self) -> int:
        """Of a head's query, and key."""
        return self.key_dim + self.rotary

    @property
    def state(self) -> Latent:
        """What such a layer keeps of a sequence."""
        return Latent(self.rank, self.rotary)

    def decompressing(self, w: Weights) -> list[Weight]:
        """The matrices that make keys and values of the latent rows."""
        return [w.attn_kv_b_weight] if self.joined else [w.attn_k_b_weight, w.attn_v_b_weight]

    def shapes(self, hidden: int) -> Shapes:
        """The tensors of such a layer, but its norm."""
        queries = self.heads * self.head_dim
        shapes: Shapes = {"attn_q": (queries, hidden)}
        if self.query_rank:
            shapes = {
                "attn_q_a": (self.query_rank, hidden),
                "attn_q_a_norm": (self.query_rank,),
                "attn_q_b": (queries, self.query_rank),
            }
        shapes |= {"attn_kv_a_mqa": (self.rank + self.rotary, hidden), "attn_kv_a_norm": (self.rank,)}
        if self.joined:
            shapes["attn_kv_b.weight="] = (self.heads * (self.key_dim + self.value_dim), self.rank)
        else:
            shapes["attn_k_b.weight="] = (self.heads, self.rank, self.key_dim)
            shapes["attn_v_b.weight="] = (self.heads, self.value_dim, self.rank)
        return {**shapes, "attn_output": (hidden, self.heads * self.value_dim)}
