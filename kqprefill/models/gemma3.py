"""Gemma 3 (arXiv 2503.19786): norms before and after each half of a layer, five layers of sliding-window attention to
one of full attention, each kind with its own rotary base."""

from __future__ import annotations

from .gemma import Gemma
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Gemma3(Gemma):
    architecture = "gemma3"
    examples = "Gemma 3 27B, Gemma 3 4B, Gemma 3 270M"

    def block_shapes(self, index: int) -> Shapes:
        width, head = (self.config.embedding_length,), (self.config.head_dim,)
        norms = {"attn_q_norm": head, "attn_k_norm": head, "post_attention_norm": width, "post_ffw_norm": width}
        return {**super().block_shapes(index), **norms}

    def read_hyper_parameters(self) -> None:
        self.rope_global = self.read_rope()
        self.rope_local = self.read_rope(base=self.meta.number("rope.freq_base_swa", 10000.0), scaled=False)
        self.sliding_window = self.meta.integer("attention.sliding_window")
        self.pattern = self.meta.integer("attention.sliding_window_pattern", 6)
        self.attention_scale = self.attention_scale_of(blocks_27b=62)

    def window(self, index: int) -> int | None:
        return None if (index + 1) % self.pattern == 0 else self.sliding_window

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        window = self.window(index)
        rope = self.rope_global if window is None else self.rope_local
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, q_norm=w.attn_q_norm, k_norm=w.attn_k_norm, rope=rope)
        seen = ops.attention(q, k, v, scale=self.attention_scale, window=window, both_ways=self.both_ways)
        a = ops.linear(seen, w.attn_output)
        x = ops.add_rms_norm(x, a, w.post_attention_norm)
        h = ops.norm(x, w.ffn_norm)
        m = ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)
