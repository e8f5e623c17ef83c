"""Kimi Delta Attention (arXiv 2510.26692): Gated DeltaNet whose state decays by a factor for each element of a key."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Recurrent
from .config import ArchMetadata
from .weights import Shapes


@dataclass(frozen=True)
class KimiDelta:
    """The sizes of such a layer: heads of q, k and v, elements of each, and taps of the convolutions."""

    heads: int
    head_dim: int
    kernel: int

    @classmethod
    def from_gguf(cls, meta: ArchMetadata) -> KimiDelta:
        """Raises ModelError for sizes that are missing."""
        return cls(meta.integer("attention.head_count"), meta.integer("kda.head_dim"), meta.integer("ssm.conv_kernel"))

    @property
    def width(self) -> int:
        """Values of one token's q, k, or v."""
        return self.heads * self.head_dim

    @property
    def state(self) -> Recurrent:
        """What such a layer keeps of a sequence; its convolutions' rows are of q, k and v, one after another."""
        rates = self.width + self.heads
        return Recurrent(self.heads, self.head_dim, self.head_dim, 3 * self.width, self.kernel - 1, rates)

    def shapes(self, hidden: int) -> Shapes:
        """The tensors of such a layer, but the norm before it."""
        width, head = self.width, self.head_dim
        return {
            **{f"attn_{part}": (width, hidden) for part in "qkv"},
            **{f"ssm_conv1d_{part}": (width, self.kernel) for part in "qkv"},
            "ssm_f_a": (head, hidden),
            "ssm_f_b": (width, head),
            "ssm_dt.bias=": (width,),
            "ssm_a=": (self.heads,),
            "ssm_beta": (self.heads, hidden),
            "ssm_g_a": (head, hidden),
            "ssm_g_b": (width, head),
            "ssm_norm": (head,),
            "attn_output": (hidden, width),
        }
