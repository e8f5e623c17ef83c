"""Gemma (arXiv 2403.08295): Llama's layers with GeGLU; the embedding is scaled and is the output matrix too. GGUF holds the norm
weights with their 1 added."""

from __future__ import annotations

import math

from ..backends.base import Ops, Residual
from .family import Family
from .weights import Weights


class Gemma(Family):
    architecture = "gemma"

    def attention_scale_of(self, blocks_27b: int) -> float:
        """What the later Gemmas scale q by: 1 / sqrt(head_dim), but in their 27B models 1 / sqrt(embedding_length / head_count).

        blocks_27b: the 27B model's number of layers. GGUF has no field that says which is meant; llama.cpp, too, tells the
        27B model by its layers.
        """
        c = self.config
        return 1 / math.sqrt(c.embedding_length / c.head_count if c.block_count == blocks_27b else c.head_dim)

    def embed(self, ops: Ops) -> Residual:
        return ops.embed(self.token_embd, scale=math.sqrt(self.config.embedding_length))

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.rms_norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.rms_norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh", residual=x)
