"""Gemma (arXiv 2403.08295): Llama's layers with GeGLU; the embedding is scaled, and is the output matrix too.

Gemma's norms multiply by 1 + weight; GGUF holds the weights with the 1 added.
"""

from __future__ import annotations

import math

from .family import Family
from .ops import Ops, Residual
from .weights import Weights


class Gemma(Family):
    architecture = "gemma"
    examples = "Gemma 2B, Gemma 7B"

    def attention_scale_of(self, blocks_27b: int) -> float:
        """1 / sqrt(head_dim); in the 27B models of Gemma 2 and 3, 1 / sqrt(embedding_length / head_count).

        blocks_27b: how many layers the 27B model has. GGUF does not say which scale is meant: llama.cpp, too, knows the
        27B model by the number of its layers.
        """
        c = self.config
        return 1 / math.sqrt(c.embedding_length / c.head_count if c.block_count == blocks_27b else c.head_dim)

    def embed(self, ops: Ops) -> Residual:
        return ops.embed(self.token_embd, scale=math.sqrt(self.config.embedding_length))

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh", residual=x)
