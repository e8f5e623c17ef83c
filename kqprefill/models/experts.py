"""Mixture of experts (arXiv 1701.06538, 2401.04088): a router gives each token a few of many feed-forward networks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """count: of a layer; used: by each token; width: of each one's hidden layer; normalise: whether the used ones' shares are made to
    add up to 1; routed_after: whether the softmax is over the used ones' scores alone."""

    count: int
    used: int
    width: int
    normalise: bool = False
    routed_after: bool = False

    @classmethod
    def from_gguf(cls, meta, config, **options):
        """Raises ModelError for numbers that contradict."""
        count, used = meta.integer("expert_count"), meta.integer("expert_used_count")
        if used > count:
            raise meta.error(f"expert_used_count {used} is more than expert_count {count}")
        return cls(count, used, meta.integer("expert_feed_forward_length", config.feed_forward_length), **options)

    def instead_of(self, shapes, config):
        """A block's shapes (Family.block_shapes) with experts in place of one feed-forward network."""
        hidden, dense = config.embedding_length, ("ffn_gate", "ffn_up", "ffn_down")
        return {
            **{name: shape for name, shape in shapes.items() if name not in dense},
            "ffn_gate_inp": (self.count, hidden),
            "ffn_gate_exps": (self.count, self.width, hidden),
            "ffn_up_exps": (self.count, self.width, hidden),
            "ffn_down_exps": (self.count, hidden, self.width),
        }
