"""Llama 4 (Meta AI): three layers of four see their own chunk of the sequence, with rotation and then norms of q and k;
every fourth sees all of it, without rotation, with queries that grow with the position (arXiv 2501.19399). Experts get
their input under a sigmoid's share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .config import Rope
from .experts import Experts, shared_expert
from .family import Family
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights

_UNROTATED = Rope(np.empty(0), beta=0.1, beta_length=8192, beta_offset=1)
_PLAIN_EXPERTS = 128  # Maverick's: its q and k are not normalised, which no metadata say


class Llama4(Family):
    architecture = "llama4"
    examples = "Llama 4 Scout, Llama 4 Maverick"
    rope_interleaved = True
    chunk = 8192  # llama.cpp has this, and the numbers above, fixed, too (src/models/llama4.cpp)
    experts: Experts

    def read_experts(self) -> Experts:
        meta = self.meta
        if meta.has("attention.sliding_window"):
            raise meta.error("attention.sliding_window: models without chunks (MobileLLM) are not supported")
        self.step = meta.integer("interleave_moe_layer_step")
        return replace(Experts.from_gguf(meta, self.config), sigmoid=True, weighs_input=True)

    def has_experts(self, index: int) -> bool:
        """Whether a layer has them; the others are dense."""
        return (index + 1) % self.step == 0

    def is_chunked(self, index: int) -> bool:
        """Whether a layer sees its own chunk of the sequence only."""
        return (index + 1) % 4 != 0

    def block_shapes(self, index: int) -> Shapes:
        shapes = super().block_shapes(index)
        if not self.has_experts(index):
            return shapes
        shared = shared_expert(self.experts.width, self.config.embedding_length)
        return {**self.experts.instead_of_dense(shapes, self.config, fused=True), **shared}

    def block_parts(self, index: int) -> Parts:
        return self.experts.fused_parts if self.has_experts(index) else {}

    def window(self, index: int) -> int | None:
        return self.chunk if self.is_chunked(index) else None

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h, chunked = ops.norm(x, w.attn_norm), self.is_chunked(index)
        rope, normed = (self.rope, self.experts.count != _PLAIN_EXPERTS) if chunked else (_UNROTATED, False)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=rope, normed_last=normed)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index), chunked=chunked)
        x = ops.linear(a, w.attn_output, residual=x)
        h = ops.norm(x, w.ffn_norm)
        if not self.has_experts(index):
            return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
        x = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu", residual=x)
        return ops.moe(h, w, self.experts, activation="silu", residual=x)
