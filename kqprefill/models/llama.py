"""Llama (arXiv 2302.13971, 2407.21783) and what shares its shape: Mistral, Yi, TinyLlama, ..."""

from .family import Family


class Llama(Family):
    architecture = "llama"
    rope_interleaved = True  # llama.cpp's converter permutes q and k for it

    def layer(self, ops, w, x, index):
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.rms_norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
