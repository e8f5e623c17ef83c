"""Gemma 2 (arXiv 2408.00118): norms before and after each half of a layer, every other layer with a sliding window,
attention scores and logits capped softly."""

from __future__ import annotations

from ..core import Logits, PendingHead
from .gemma import Gemma
from .ops import Ops, Residual
from .weights import Shapes, Weights


class Gemma2(Gemma):
    architecture = "gemma2"
    examples = "Gemma 2 9B, Gemma 2 27B"

    def block_shapes(self, index: int) -> Shapes:
        width = (self.config.embedding_length,)
        return {**super().block_shapes(index), "post_attention_norm": width, "post_ffw_norm": width}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.integer("attention.sliding_window", 4096)
        self.softcap = self.meta.number("attn_logit_softcapping", 50.0)
        self.final_softcap = self.meta.number("final_logit_softcapping", 30.0)
        self.attention_scale = self.attention_scale_of(blocks_27b=46)

    def window(self, index: int) -> int | None:
        return self.sliding_window if index % 2 == 0 else None

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index), softcap=self.softcap)
        x = ops.add_rms_norm(x, ops.linear(a, w.attn_output), w.post_attention_norm)
        h = ops.norm(x, w.ffn_norm)
        m = ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)

    def head(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        return ops.head(x, self.output_norm, self.output, logits, softcap=self.final_softcap)
