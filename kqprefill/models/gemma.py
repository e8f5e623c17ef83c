"""Gemma (arXiv 2403.08295): Llama's layers with GeGLU; the embedding is scaled and is the output matrix too. GGUF holds the norm
weights with their 1 added."""

import math

from .family import Family


class Gemma(Family):
    architecture = "gemma"

    def scale_by_size(self, blocks_27b):
        """Set attention_scale: the later 27B models scale q by their width a head, all others by the head's dimension."""
        c = self.config
        per_head = c.embedding_length / c.head_count if c.block_count == blocks_27b else c.head_dim
        self.attention_scale = 1 / math.sqrt(per_head)

    def embed(self, ops, tokens):
        return ops.embed(self.token_embd, tokens, scale=math.sqrt(self.config.embedding_length))

    def layer(self, ops, w, x, index):
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.rms_norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh", residual=x)
