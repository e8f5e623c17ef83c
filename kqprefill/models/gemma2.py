"""Gemma 2 (arXiv 2408.00118): norms before and after each half of a layer, every other layer with a sliding window, attention
scores and logits capped softly."""

from .gemma import Gemma

_BLOCKS_27B = 46


class Gemma2(Gemma):
    architecture = "gemma2"

    def block_shapes(self):
        width = (self.config.embedding_length,)
        return {**super().block_shapes(), "post_attention_norm": width, "post_ffw_norm": width}

    def read_hyper_parameters(self):
        super().read_hyper_parameters()
        self.window = self.meta.integer("attention.sliding_window", 4096)
        self.softcap = self.meta.number("attn_logit_softcapping", 50.0)
        self.final_softcap = self.meta.number("final_logit_softcapping", 30.0)
        self.scale_by_size(_BLOCKS_27B)

    def layer(self, ops, w, x, index):
        window = self.window if index % 2 == 0 else None
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=window, softcap=self.softcap)
        x = ops.add_rms_norm(x, ops.linear(a, w.attn_output), w.post_attention_norm)
        h = ops.rms_norm(x, w.ffn_norm)
        m = ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)

    def head(self, ops, x, logits):
        return ops.head(x, self.output_norm, self.output, logits, softcap=self.final_softcap)
