"""Seed-OSS (ByteDance Seed): Qwen 2's layers with heads of a size of their own; the norm before the feed-forward
network is called post_attention_norm."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class SeedOss(Family):
    architecture = "seed_oss"
    examples = "Seed-OSS 36B"

    def block_shapes(self, index: int) -> Shapes:
        shapes = super().block_shapes(index)
        shapes["post_attention_norm"] = shapes.pop("ffn_norm")
        return shapes

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.post_attention_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
