"""StarCoder 2 (arXiv 2402.19173): LayerNorm, biases everywhere, and a feed-forward network without a gate."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class StarCoder2(Family):
    architecture = "starcoder2"
    examples = "StarCoder 2 15B, StarCoder 2 7B, StarCoder 2 3B"
    layer_norm = True
    last_norm = "output_norm+"

    def block_shapes(self, index: int) -> Shapes:
        shapes = {f"{n}+" if n.endswith("_norm") else n: s for n, s in super().block_shapes(index).items()}
        del shapes["ffn_gate"]
        return shapes

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, None, w.ffn_up, w.ffn_down, activation="gelu_tanh", residual=x)
