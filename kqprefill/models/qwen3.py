"""Qwen 3 (arXiv 2505.09388): q and k are RMS-normalised, head by head, before they are rotated."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights

_RANK = 4  # pooling_type: a classifier's (llama.cpp's LLAMA_POOLING_TYPE_RANK)


class Qwen3(Family):
    architecture = "qwen3"
    examples = "Qwen 3 8B, Qwen 3 32B, Qwen3-Embedding 8B, Qwen3-Reranker 4B"

    def shared_shapes(self) -> Shapes:
        """Qwen3-Reranker's files may have a classifier: rows for "yes" and for "no"."""
        classifier = {"cls.output?": (2, self.config.embedding_length)}
        return {**super().shared_shapes(), **(classifier if self.meta.count("pooling_type") == _RANK else {})}

    def block_shapes(self, index: int) -> Shapes:
        head = (self.config.head_dim,)
        return {**super().block_shapes(index), "attn_q_norm": head, "attn_k_norm": head}

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, q_norm=w.attn_q_norm, k_norm=w.attn_k_norm, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
