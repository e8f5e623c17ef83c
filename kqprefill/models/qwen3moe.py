"""Qwen 3 with experts (arXiv 2505.09388): Qwen 3's layers, each with many feed-forward networks."""

from .experts import Experts
from .qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    architecture = "qwen3moe"
    has_experts = True

    def block_shapes(self):
        self.experts = Experts.from_gguf(self.meta, self.config, normalise=True)
        return self.experts.instead_of(super().block_shapes(), self.config)

    def layer(self, ops, w, x, index):
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, q_norm=w.attn_q_norm, k_norm=w.attn_k_norm, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        return ops.moe(ops.rms_norm(x, w.ffn_norm), w, self.experts, activation="silu", residual=x)
