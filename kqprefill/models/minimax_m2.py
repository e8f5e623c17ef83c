"""MiniMax-M2 (MiniMax AI): q and k normalised over all heads at once, half of each head rotated; experts chosen by
sigmoids with a bias that only the choice sees."""

from __future__ import annotations

from dataclasses import replace

from .experts import Experts
from .olmoe import Olmoe
from .weights import Shapes


class MiniMaxM2(Olmoe):
    architecture = "minimax-m2"
    examples = "MiniMax M2.5, MiniMax M2"

    def block_shapes(self, index: int) -> Shapes:
        return {**super().block_shapes(index), "exp_probs_b.bias=": (self.experts.count,)}

    def read_experts(self) -> Experts:
        return replace(Experts.routed_by_metadata(self.meta, self.config, sigmoid=True), normalise=True)
