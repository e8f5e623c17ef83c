"""Phi 3 and 4 (arXiv 2404.14219): Llama's layers, with q, k, v in one matrix and gate and up in another, and rotary frequencies
divided by factors of their own for long contexts."""

from ..gguf import dequantize
from .family import Family


class Phi3(Family):
    architecture = "phi3"

    def block_shapes(self):
        c = self.config
        shapes = {
            name: shape
            for name, shape in super().block_shapes().items()
            if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")
        }
        fused = {
            "attn_qkv": (c.q_width + 2 * c.kv_width, c.embedding_length),
            "ffn_up": (2 * c.feed_forward_length, c.embedding_length),
        }
        return {**shapes, **fused}

    def block_parts(self):
        c = self.config
        return {
            "attn_qkv": {"attn_q": c.q_width, "attn_k": c.kv_width, "attn_v": c.kv_width},
            "ffn_up": {"ffn_gate": c.feed_forward_length, "ffn_up": c.feed_forward_length},
        }

    def more_shapes(self, pairs):
        return {"rope_factors_long?": (pairs,), "rope_factors_short?": (pairs,)}

    def read_hyper_parameters(self):
        super().read_hyper_parameters()
        self.window = (
            self.meta.integer("attention.sliding_window") if self.meta.has("attention.sliding_window") else None
        )

    def rope_factors(self):
        """By the context that the model has, not by each prompt's length: so no prompt's beginning depends on its end
        (llama.cpp does the same by the context it is run with)."""
        original = self.meta.integer("rope.scaling.original_context_length", self.config.context_length)
        long = self.config.context_length > original
        factors = self.shared.get("rope_factors_long" if long else "rope_factors_short")
        return factors and dequantize(factors.tensor.data, factors.tensor.type)

    def layer(self, ops, w, x, index):
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window)
        x = ops.linear(a, w.attn_output, residual=x)
        h = ops.rms_norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
