"""Qwen 2 with experts (arXiv 2407.10671): beside those that a token is routed to, one that every token goes through,
under a gate of its own."""

from __future__ import annotations

from .experts import Experts
from .ops import Ops, Residual
from .qwen2 import Qwen2
from .weights import Shapes, Weights


class Qwen2Moe(Qwen2):
    architecture = "qwen2moe"
    examples = "Qwen 2 57B-A14B, Qwen 1.5 MoE A2.7B"
    experts: Experts

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shared = self.meta.integer("expert_shared_feed_forward_length", c.feed_forward_length)
        return {
            **super().block_shapes(index),
            "ffn_gate_inp_shexp": (c.embedding_length,),
            "ffn_gate_shexp": (shared, c.embedding_length),
            "ffn_up_shexp": (shared, c.embedding_length),
            "ffn_down_shexp": (c.embedding_length, shared),
        }

    def read_experts(self) -> Experts:
        return Experts.from_gguf(self.meta, self.config)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        shared = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu")
        both = shared, w.ffn_gate_inp_shexp
        return ops.moe(h, w, self.experts, activation="silu", residual=x, shared=both)
