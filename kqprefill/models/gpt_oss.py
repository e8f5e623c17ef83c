"""gpt-oss (arXiv 2508.10925): every other layer with a sliding window, a learned sink in each head's softmax, experts whose gates
are clamped."""

from .experts import Experts
from .family import Family


class GptOss(Family):
    architecture = "gpt-oss"
    has_experts = True

    def block_shapes(self):
        c = self.config
        self.experts = Experts.from_gguf(self.meta, c, routed_after=True)
        shapes = self.experts.instead_of(super().block_shapes(), c)
        shapes["post_attention_norm"] = shapes.pop("ffn_norm")
        return {**shapes, "attn_sinks": (c.head_count,)}

    def read_hyper_parameters(self):
        super().read_hyper_parameters()
        self.window = self.meta.integer("attention.sliding_window")

    def layer(self, ops, w, x, index):
        window = self.window if index % 2 == 0 else None
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=window, sinks=w.attn_sinks)
        x = ops.linear(a, w.attn_output, residual=x)
        return ops.moe(ops.rms_norm(x, w.post_attention_norm), w, self.experts, activation="swiglu_oai", residual=x)
