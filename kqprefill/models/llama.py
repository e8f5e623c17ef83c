"""Llama (arXiv 2302.13971, 2407.21783) and what shares its layers: Mistral, Mixtral (arXiv 2401.04088), Yi."""

from __future__ import annotations

from .experts import Experts
from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Llama(Family):
    architecture = "llama"
    examples = "Llama 3.1 8B, Llama 3.3 70B, Mistral 7B, Mixtral 8x7B, Yi 34B, SmolLM2 1.7B"
    rope_interleaved = True  # llama.cpp's converter permutes q and k for it

    def block_shapes(self, index: int) -> Shapes:
        shapes = super().block_shapes(index)
        return shapes if self.experts is None else self.experts.instead_of_dense(shapes, self.config)

    def read_experts(self) -> Experts | None:
        if not self.meta.has("expert_count"):  # Mixtral's GGUFs, which have it, are Llamas
            return None
        return Experts.from_gguf(self.meta, self.config, normalise=True)

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        return ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        if self.experts is not None:
            return ops.moe(h, w, self.experts, activation="silu", residual=x)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
