"""gpt-oss (arXiv 2508.10925): every other layer with a sliding window, a learned sink in each head's softmax, experts
whose gates are clamped."""

from __future__ import annotations

from .experts import Experts
from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights


class GptOss(Family):
    architecture = "gpt-oss"
    examples = "gpt-oss 20B, gpt-oss 120B"
    experts: Experts

    def block_shapes(self, index: int) -> Shapes:
        shapes = self.experts.instead_of_dense(super().block_shapes(index), self.config)
        shapes["post_attention_norm"] = shapes.pop("ffn_norm")
        return {**shapes, "attn_sinks": (self.config.head_count,)}

    def read_experts(self) -> Experts:
        return Experts.from_gguf(self.meta, self.config, routed_after=True)

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.integer("attention.sliding_window")

    def window(self, index: int) -> int | None:
        return self.sliding_window if index % 2 == 0 else None

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index), sinks=w.attn_sinks)
        x = ops.linear(a, w.attn_output, residual=x)
        return ops.moe(ops.norm(x, w.post_attention_norm), w, self.experts, activation="swiglu_oai", residual=x)
