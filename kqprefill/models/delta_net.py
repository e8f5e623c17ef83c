"""Gated DeltaNet (arXiv 2412.06464): a layer that mixes tokens by a recurrence instead of attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core import Recurrent
from .config import ArchMetadata
from .weights import Shapes


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of such a layer.

    key_heads, value_heads: heads of q and k, and of v. head_dim: of each. kernel: taps of the convolution. by_turns:
    whether value head v uses key head v mod key_heads; else neighbouring value heads share a key head.
    """

    key_heads: int
    value_heads: int
    head_dim: int
    kernel: int
    by_turns: bool

    @classmethod
    def from_gguf(cls, meta: ArchMetadata, *, by_turns: bool) -> DeltaNet:
        """Raises ModelError for sizes that contradict."""
        net = cls(
            meta.integer("ssm.group_count"),
            meta.integer("ssm.time_step_rank"),
            meta.integer("ssm.state_size"),
            meta.integer("ssm.conv_kernel"),
            by_turns,
        )
        if net.value_heads % net.key_heads:
            raise meta.error(f"ssm.time_step_rank {net.value_heads} is no multiple of ssm.group_count {net.key_heads}")
        if meta.integer("ssm.inner_size") != net.value_width:
            raise meta.error("ssm.inner_size is not ssm.time_step_rank times ssm.state_size")
        return net

    @property
    def key_width(self) -> int:
        """Values of one token's q, or k."""
        return self.key_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Values of one token's v."""
        return self.value_heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution goes over: q, k and v, one after another."""
        return 2 * self.key_width + self.value_width

    @property
    def key_head_of(self) -> NDArray[np.intp]:
        """The key head of each value head."""
        heads = np.arange(self.value_heads)
        return heads % self.key_heads if self.by_turns else heads // (self.value_heads // self.key_heads)

    @property
    def state(self) -> Recurrent:
        """What such a layer keeps of a sequence."""
        heads = self.value_heads
        return Recurrent(heads, self.head_dim, self.head_dim, self.channels, self.kernel - 1, rates=2 * heads)

    def shapes(self, hidden: int) -> Shapes:
        """The tensors of such a layer, but its norm."""
        return {
            "attn_qkv": (self.channels, hidden),
            "attn_gate": (self.value_width, hidden),
            "ssm_conv1d": (self.channels, self.kernel),
            "ssm_dt.bias=": (self.value_heads,),
            "ssm_a=": (self.value_heads,),
            "ssm_beta": (self.value_heads, hidden),
            "ssm_alpha": (self.value_heads, hidden),
            "ssm_norm": (self.head_dim,),
            "ssm_out": (hidden, self.value_width),
        }
