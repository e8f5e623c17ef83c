"""OLMo 2 (arXiv 2501.00656) and 3: norms only after each half of a layer, q and k normalised over all heads at once; in
OLMo 3 three layers of four with a sliding window and without the rotary scaling."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Olmo2(Family):
    architecture = "olmo2"
    examples = "OLMo 2 32B, OLMo 3 7B"

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shapes = super().block_shapes(index)
        del shapes["attn_norm"], shapes["ffn_norm"]
        width = (c.embedding_length,)
        norms = {
            "attn_q_norm": (c.q_width,),
            "attn_k_norm": (c.kv_width,),
            "post_attention_norm": width,
            "post_ffw_norm": width,
        }
        return {**shapes, **norms}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.integer_or_none("attention.sliding_window")  # None in OLMo 2
        self.pattern = self.meta.integer("attention.sliding_window_pattern", 4)
        self.rope_local = self.read_rope(scaled=False)

    def window(self, index: int) -> int | None:
        return None if (index + 1) % self.pattern == 0 else self.sliding_window

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        window = self.window(index)
        rope = self.rope if window is None else self.rope_local
        q_norm, k_norm = w.attn_q_norm, w.attn_k_norm
        q, k, v = ops.qkv(ops.cast(x), w.attn_q, w.attn_k, w.attn_v, rope=rope, q_norm=q_norm, k_norm=k_norm)
        a = ops.linear(ops.attention(q, k, v, scale=self.attention_scale, window=window), w.attn_output)
        x = ops.add_rms_norm(x, a, w.post_attention_norm)
        m = ops.mlp(ops.cast(x), w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)
