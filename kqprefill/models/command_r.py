"""Command R (Cohere): LayerNorm before two branches that run side by side, attention and a feed-forward network; a
scale on the logits. Command R+ normalises q and k, with weights for each head."""

from __future__ import annotations

from ..core import Logits, PendingHead
from .config import Rope
from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights

_NORMED_LAYERS = 64  # from so many layers on q and k are normalised (llama.cpp, too, knows Command R+ by that)


class CommandR(Family):
    architecture = "command-r"
    examples = "Command R 35B, Command R+ 104B"
    rope_interleaved = True
    layer_norm = True

    @property
    def norms_heads(self) -> bool:
        """Whether q and k are normalised."""
        return self.config.block_count >= _NORMED_LAYERS

    def block_shapes(self, index: int) -> Shapes:
        c, shapes = self.config, super().block_shapes(index)
        del shapes["ffn_norm"]
        if not self.norms_heads:
            return shapes
        norms = {"attn_q_norm": (c.head_count, c.head_dim), "attn_k_norm": (c.head_count_kv, c.head_dim)}
        return {**shapes, **norms}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.logit_scale = self.meta.number("logit_scale")

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        window = self.window(index)
        h, q_norm, k_norm = ops.norm(x, w.attn_norm), w.get("attn_q_norm"), w.get("attn_k_norm")
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope_of(index), q_norm=q_norm, k_norm=k_norm)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=window)
        x = ops.linear(a, w.attn_output, residual=x)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)

    def rope_of(self, index: int) -> Rope | None:
        """A layer's rotation."""
        return self.rope

    def head(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        return ops.head(x, self.output_norm, self.output, logits, scale=self.logit_scale)
