"""Hunyuan (Tencent, arXiv 2411.02265): Llama's layers, with q and k normalised head by head after they are rotated;
dense, or with experts beside one that every token goes through."""

from __future__ import annotations

from dataclasses import replace

from .config import Rope
from .experts import Experts, shared_expert
from .family import Family
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class HunyuanDense(Family):
    """Hunyuan (Tencent): Llama's layers, with q and k normalised head by head after they are rotated."""

    architecture = "hunyuan-dense"
    examples = "Hunyuan 7B, Hunyuan 1.8B"

    def block_shapes(self, index: int) -> Shapes:
        head = (self.config.head_dim,)
        return {**super().block_shapes(index), "attn_q_norm": head, "attn_k_norm": head}

    def read_rope(self, *, base: float | None = None, scaled: bool = True) -> Rope:
        """With a larger base where the file asks for it (rope.scaling.alpha: NTK-aware scaling)."""
        if self.meta.has("rope.scaling.alpha"):
            head_dim, alpha = self.config.head_dim, self.meta.number("rope.scaling.alpha")
            base = self.meta.number("rope.freq_base", 10000.0) * alpha ** (head_dim / (head_dim - 2))
        return super().read_rope(base=base, scaled=scaled)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h, rope, norms = ops.norm(x, w.attn_norm), self.rope, (w.attn_q_norm, w.attn_k_norm)
        q, k, v = ops.qkv(
            h, w.attn_q, w.attn_k, w.attn_v, rope=rope, q_norm=norms[0], k_norm=norms[1], normed_last=True
        )
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        return self.feed_forward(ops, w, x)

    def feed_forward(self, ops: Ops, w: Weights, x: Residual) -> Residual:
        """A layer's second half."""
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)


class HunyuanMoe(HunyuanDense):
    """Hunyuan (Tencent, arXiv 2411.02265) with experts, beside one that every token goes through; q and k are
    normalised head by head after they are rotated.
    """

    architecture = "hunyuan-moe"
    examples = "Hunyuan A13B"
    experts: Experts

    def read_experts(self) -> Experts:
        width = self.config.feed_forward_length
        self.shared_width = self.meta.integer("expert_shared_feed_forward_length", width)
        return replace(Experts.from_gguf(self.meta, self.config, normalise=True), width=width)

    def block_shapes(self, index: int) -> Shapes:
        shapes = self.experts.instead_of_dense(super().block_shapes(index), self.config, fused=True)
        return {**shapes, **shared_expert(self.shared_width, self.config.embedding_length)}

    def block_parts(self, index: int) -> Parts:
        return self.experts.fused_parts

    def feed_forward(self, ops: Ops, w: Weights, x: Residual) -> Residual:
        h = ops.norm(x, w.ffn_norm)
        x = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu", residual=x)
        return ops.moe(h, w, self.experts, activation="silu", residual=x)
