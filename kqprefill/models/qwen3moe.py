"""Qwen 3 with experts (arXiv 2505.09388): Qwen 3's layers, each with many feed-forward networks."""

from __future__ import annotations

from .experts import Experts
from .ops import Ops, Residual
from .qwen3 import Qwen3
from .weights import Shapes, Weights


class Qwen3Moe(Qwen3):
    architecture = "qwen3moe"
    examples = "Qwen 3 30B-A3B, Qwen 3 235B-A22B, Qwen3-Coder 30B-A3B"
    experts: Experts

    def block_shapes(self, index: int) -> Shapes:
        return self.experts.instead_of_dense(super().block_shapes(index), self.config)

    def read_experts(self) -> Experts:
        return Experts.from_gguf(self.meta, self.config, normalise=True)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, q_norm=w.attn_q_norm, k_norm=w.attn_k_norm, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        return ops.moe(ops.norm(x, w.ffn_norm), w, self.experts, activation="silu", residual=x)
