"""Mixture of experts (arXiv 1701.06538, 2401.04088): a router gives each token a few of many feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ArchMetadata, Config
from .weights import Parts, Shapes

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func: llama.cpp's llama_expert_gating_func_type


@dataclass(frozen=True)
class Experts:
    """A layer's experts, and how tokens are routed to them.

    count: experts of a layer. used: experts that a token goes through, those of the highest scores. width: of each
    expert's hidden layer. sigmoid: whether scores become probabilities one by one (arXiv 2412.19437), rather than by a
    softmax over all. normalise: whether the shares of a token's used experts are divided by their sum. routed_after:
    whether the softmax that gives the shares is over the used experts' scores alone. scale: what the shares are
    multiplied by at last. groups, groups_used: experts are in so many groups, of which a token's are those of the best
    so many; a group is as good as its two best experts together. gated: whether an expert's network has a gate.
    weighs_input: whether a share multiplies what goes into an expert, rather than what comes out of it; experts are
    chosen by their scores then, before those become probabilities.
    """

    count: int
    used: int
    width: int
    normalise: bool = False
    routed_after: bool = False
    sigmoid: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    gated: bool = True
    weighs_input: bool = False

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

    @classmethod
    def routed_by_metadata(cls, meta: ArchMetadata, config: Config, *, sigmoid: bool) -> Experts:
        """Experts whose routing the metadata describes too, as DeepSeek's and GLM's do. sigmoid: where it does not say.

        Raises ModelError for numbers that contradict, or a gating function that is not known.
        """
        sizes = cls.from_gguf(meta, config)
        gating = meta.count("expert_gating_func") or (_SIGMOID if sigmoid else _SOFTMAX)
        if gating not in (_SOFTMAX, _SIGMOID):
            raise meta.error(f"expert_gating_func {gating} is not supported (1, softmax, and 2, sigmoid, are)")
        groups = max(1, meta.count("expert_group_count"))
        groups_used = meta.integer("expert_group_used_count", groups) if groups > 1 else 1
        room = sizes.count // groups * groups_used
        if sizes.count % groups or groups_used > groups or sizes.used > room:
            raise meta.error(
                f"{sizes.used} of {sizes.count} experts do not come from {groups_used} of {groups} expert groups"
            )
        scale = meta.number("expert_weights_scale", 1.0) if meta.has("expert_weights_scale") else 1.0
        return cls(
            sizes.count,
            sizes.used,
            sizes.width,
            normalise=meta.flag("expert_weights_norm", False),
            sigmoid=gating == _SIGMOID,
            scale=scale,
            groups=groups,
            groups_used=groups_used,
        )

    @property
    def chooses_by_more(self) -> bool:
        """Whether experts are chosen, or shares made, by more than a softmax of the scores."""
        return self.sigmoid or self.scale != 1.0 or self.groups > 1

    @property
    def fused_parts(self) -> Parts:
        """Where gate and up of each expert may be one matrix: its parts (Family.block_parts)."""
        return {"ffn_gate_up_exps": {"ffn_gate_exps": self.width, "ffn_up_exps": self.width}}

    def instead_of_dense(self, shapes: Shapes, config: Config, fused: bool = False) -> Shapes:
        """A block's shapes (Family.block_shapes) with a router and experts in the place of one feed-forward network.

        fused: gate and up may be one matrix instead (`fused_parts`).
        """
        hidden = config.embedding_length
        experts = {
            "ffn_gate_inp": (self.count, hidden),  # the router
            "ffn_gate_exps": (self.count, self.width, hidden),
            "ffn_up_exps": (self.count, self.width, hidden),
            "ffn_down_exps": (self.count, hidden, self.width),
        }
        if not self.gated:
            del experts["ffn_gate_exps"]
        if fused:
            for name in ("ffn_gate_exps", "ffn_up_exps"):
                experts[f"{name}?"] = experts.pop(name)
            experts["ffn_gate_up_exps?"] = (self.count, 2 * self.width, hidden)
        replaced: Shapes = {}
        for name, shape in shapes.items():
            if name == "ffn_gate":
                replaced |= experts
            elif name not in ("ffn_up", "ffn_down"):
                replaced[name] = shape
        return replaced


def shared_expert(width: int, hidden: int) -> Shapes:
    """The shapes of the network that every token goes through, beside the experts that it is routed to; none where its
    width is 0."""
    if not width:
        return {}
    return {
        "ffn_gate_shexp": (width, hidden),
        "ffn_up_shexp": (width, hidden),
        "ffn_down_shexp": (hidden, width),
    }
