"""Mamba-2 (arXiv 2405.21060): a layer that mixes tokens by a recurrence whose state decays by one factor a head."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Recurrent
from .config import ArchMetadata
from .weights import Parts, Shapes


@dataclass(frozen=True)
class Mamba2:
    """The sizes of such a layer.

    heads, head_dim: of x. state_size: rows of a head's state, and elements of B and C. groups: of so many groups of
    neighbouring heads each shares its B and C. kernel: taps of the convolution.
    """

    heads: int
    head_dim: int
    state_size: int
    groups: int
    kernel: int

    @classmethod
    def from_gguf(cls, meta: ArchMetadata) -> Mamba2:
        """Raises ModelError for sizes that contradict."""
        heads, width = meta.integer("ssm.time_step_rank"), meta.integer("ssm.inner_size")
        groups = meta.integer("ssm.group_count")
        if width % heads or heads % groups:
            sizes = f"ssm.inner_size {width}, ssm.time_step_rank {heads}, ssm.group_count {groups}"
            raise meta.error(f"{sizes}: each must be a multiple of the next")
        return cls(heads, width // heads, meta.integer("ssm.state_size"), groups, meta.integer("ssm.conv_kernel"))

    @property
    def width(self) -> int:
        """Values of one token's x."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution goes over: x, B and C, one after another."""
        return self.width + 2 * self.groups * self.state_size

    @property
    def state(self) -> Recurrent:
        """What such a layer keeps of a sequence."""
        sizes = self.state_size, self.head_dim, self.channels
        return Recurrent(self.heads, *sizes, self.kernel - 1, rates=self.heads)

    @property
    def parts(self) -> Parts:
        """The matrices that files keep in one (Family.block_parts): what makes z, what goes into the convolution, and
        the steps."""
        return {"ssm_in": {"ssm_in_z": self.width, "ssm_in_xbc": self.channels, "ssm_in_dt": self.heads}}

    def shapes(self, hidden: int) -> Shapes:
        """The tensors of such a layer, but the norm before it."""
        return {
            "ssm_in": (self.width + self.channels + self.heads, hidden),
            "ssm_conv1d": (self.channels, self.kernel),
            "ssm_dt.bias=": (self.heads,),
            "ssm_a=": (self.heads, 1),
            "ssm_d=": (self.heads, 1),
            "ssm_norm.weight=?": (self.groups, self.width // self.groups),
            "ssm_out": (hidden, self.width),
        }
