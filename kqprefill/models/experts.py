"""Mixture of experts (arXiv 1701.06538, 2401.04088): a router gives each token a few of many feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ArchMetadata, Config
from .weights import Shapes


@dataclass(frozen=True)
class Experts:
    """A layer's experts, and how tokens are routed to them.

    count: experts of a layer. used: experts that a token goes through. width: of each expert's hidden layer.
    normalise: whether the shares of a token's used experts are divided by their sum. routed_after: whether the softmax
    that gives the shares is over the used experts' scores alone, rather than over all experts'.
    """

    count: int
    used: int
    width: int
    normalise: bool = False
    routed_after: bool = False

    @classmethod
    def from_gguf(
        cls, meta: ArchMetadata, config: Config, *, normalise: bool = False, routed_after: bool = False
    ) -> Experts:
        """The sizes that the metadata gives. Raises ModelError for numbers that contradict."""
        count, used = meta.integer("expert_count"), meta.integer("expert_used_count")
        if used > count:
            raise meta.error(f"expert_used_count {used} is more than expert_count {count}")
        width = meta.integer("expert_feed_forward_length", config.feed_forward_length)
        return cls(count, used, width, normalise, routed_after)

    def instead_of_dense(self, shapes: Shapes, config: Config) -> Shapes:
        """A block's shapes (Family.block_shapes) with a router and experts in the place of one feed-forward network."""
        hidden = config.embedding_length
        experts = {
            "ffn_gate_inp": (self.count, hidden),  # the router
            "ffn_gate_exps": (self.count, self.width, hidden),
            "ffn_up_exps": (self.count, self.width, hidden),
            "ffn_down_exps": (self.count, hidden, self.width),
        }
        replaced: Shapes = {}
        for name, shape in shapes.items():
            if name == "ffn_gate":
                replaced |= experts
            elif name not in ("ffn_up", "ffn_down"):
                replaced[name] = shape
        return replaced
