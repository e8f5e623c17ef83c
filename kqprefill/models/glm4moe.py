"""GLM 4.5 to 4.7 (arXiv 2508.06471): after some dense layers, experts chosen by sigmoids with a bias that only the
choice sees, beside one that every token goes through; biases on q, k and v, and norms of q and k in the largest."""

from __future__ import annotations

from .experts import Experts, shared_expert
from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Glm4Moe(Family):
    architecture = "glm4moe"
    examples = "GLM-4.5-Air, GLM-4.6, GLM-4.7, Solar Open 100B"
    experts: Experts

    def read_experts(self) -> Experts:
        self.dense_layers = self.meta.count("leading_dense_block_count")
        return Experts.routed_by_metadata(self.meta, self.config, sigmoid=True)

    def block_shapes(self, index: int) -> Shapes:
        c, head = self.config, (self.config.head_dim,)
        shapes = {**super().block_shapes(index), "attn_q_norm?": head, "attn_k_norm?": head}
        shapes["post_attention_norm"] = shapes.pop("ffn_norm")
        if index < self.dense_layers:
            return shapes
        shared = self.experts.width * self.meta.integer("expert_shared_count", 1)
        shapes = {**self.experts.instead_of_dense(shapes, c), **shared_expert(shared, c.embedding_length)}
        return {**shapes, "exp_probs_b.bias=": (self.experts.count,)}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        if self.meta.has("rope.dimension_sections"):
            raise self.meta.error("rope.dimension_sections (GLM-4.5V's rotation by several axes) are not supported")

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q_norm, k_norm = w.get("attn_q_norm"), w.get("attn_k_norm")
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope, q_norm=q_norm, k_norm=k_norm)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.post_attention_norm)
        if index < self.dense_layers:
            return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
        x = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu", residual=x)
        return ops.moe(h, w, self.experts, activation="silu", residual=x)
