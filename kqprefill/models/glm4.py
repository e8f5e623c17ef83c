"""GLM 4 (arXiv 2406.12793; the 0414 models and Z1): Llama's layers with a norm on both sides of each half; gate and up
are one matrix, and half of each head is rotated."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class Glm4(Family):
    architecture = "glm4"
    examples = "GLM-4-32B-0414, GLM-4-9B-0414, GLM-Z1-32B"
    rope_interleaved = True

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shapes = super().block_shapes(index)
        del shapes["ffn_gate"]
        shapes["ffn_up"] = (2 * c.feed_forward_length, c.embedding_length)
        width = (c.embedding_length,)
        return {**shapes, "post_attention_norm": width, "post_ffw_norm": width}

    def block_parts(self, index: int) -> Parts:
        width = self.config.feed_forward_length
        return {"ffn_up": {"ffn_gate": width, "ffn_up": width}}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        if self.meta.has("rope.dimension_sections"):
            raise self.meta.error("rope.dimension_sections (GLM-4V's rotation by several axes) are not supported")

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output)
        x = ops.add_rms_norm(x, a, w.post_attention_norm)
        h = ops.norm(x, w.ffn_norm)
        m = ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)
