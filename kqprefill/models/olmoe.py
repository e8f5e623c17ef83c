"""OLMoE (arXiv 2409.02060): q and k normalised over all heads at once, and many small experts."""

from __future__ import annotations

from .experts import Experts
from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Olmoe(Family):
    architecture = "olmoe"
    examples = "OLMoE 1B-7B"
    experts: Experts

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        norms = {"attn_q_norm": (c.q_width,), "attn_k_norm": (c.kv_width,)}
        return {**self.experts.instead_of_dense(super().block_shapes(index), c), **norms}

    def read_experts(self) -> Experts:
        return Experts.from_gguf(self.meta, self.config)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, q_norm=w.attn_q_norm, k_norm=w.attn_k_norm, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        return ops.moe(ops.norm(x, w.ffn_norm), w, self.experts, activation="silu", residual=x)
