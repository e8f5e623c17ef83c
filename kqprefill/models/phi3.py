"""Phi 3 and 4 (arXiv 2404.14219): Llama's layers, with q, k, v in one matrix and gate and up in another; rotary
frequencies are divided by factors, of which models for long contexts have their own."""

from __future__ import annotations

from ..core import Float32Array
from .family import Family
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class Phi3(Family):
    architecture = "phi3"
    examples = "Phi 4 14B, Phi 4 mini, Phi 3.5 mini"

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shapes = super().block_shapes(index)
        del shapes["attn_q"], shapes["attn_k"], shapes["attn_v"], shapes["ffn_gate"]
        fused = {
            "attn_qkv": (c.q_width + 2 * c.kv_width, c.embedding_length),
            "ffn_up": (2 * c.feed_forward_length, c.embedding_length),
        }
        return {**shapes, **fused}

    def block_parts(self, index: int) -> Parts:
        c = self.config
        return {
            "attn_qkv": {"attn_q": c.q_width, "attn_k": c.kv_width, "attn_v": c.kv_width},
            "ffn_up": {"ffn_gate": c.feed_forward_length, "ffn_up": c.feed_forward_length},
        }

    def shared_shapes(self) -> Shapes:
        factors = (self.rotary_pairs,)
        return {**super().shared_shapes(), "rope_factors_long?": factors, "rope_factors_short?": factors}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.integer_or_none("attention.sliding_window")

    def rope_factors(self) -> Float32Array | None:
        """The long or the short factors, float32 [rotary_pairs], by the context length that the model has.

        The length of a prompt does not count, so that no prompt's beginning depends on its end. (llama.cpp goes by the
        context length that it is run with.)
        """
        original = self.meta.integer("rope.scaling.original_context_length", self.config.context_length)
        long = self.config.context_length > original
        return self.vector("rope_factors_long" if long else "rope_factors_short")

    def window(self, index: int) -> int | None:
        return self.sliding_window

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index))
        return ops.linear(a, w.attn_output, residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
