"""ERNIE 4.5 (Baidu): Llama's layers; in the large models, after some dense layers, experts that a bias helps to choose
among a softmax's probabilities, beside one that every token goes through."""

from __future__ import annotations

from dataclasses import replace

from .experts import Experts, shared_expert
from .llama import Llama
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class Ernie45(Llama):
    """ERNIE 4.5 (Baidu): Llama's layers."""

    architecture = "ernie4_5"
    examples = "ERNIE 4.5 0.3B"


class Ernie45Moe(Llama):
    """ERNIE 4.5 (Baidu) with experts: after some dense layers, experts that a bias helps to choose among a
    softmax's probabilities, beside one that every token goes through.
    """

    architecture = "ernie4_5-moe"
    examples = "ERNIE 4.5 21B-A3B, ERNIE 4.5 300B-A47B"
    experts: Experts

    def read_experts(self) -> Experts:
        self.dense_layers = self.meta.count("leading_dense_block_count")
        self.step = self.meta.integer("interleave_moe_layer_step", 1)
        self.shared_width = self.meta.count("expert_shared_feed_forward_length")
        return replace(Experts.routed_by_metadata(self.meta, self.config, sigmoid=False), normalise=True)

    def has_experts(self, index: int) -> bool:
        return index >= self.dense_layers and (index + 1) % self.step == 0

    def block_shapes(self, index: int) -> Shapes:
        shapes = super(Llama, self).block_shapes(index)
        if not self.has_experts(index):
            return shapes
        shapes = self.experts.instead_of_dense(shapes, self.config, fused=True)
        shapes["exp_probs_b.bias=?"] = (self.experts.count,)
        return {**shapes, **shared_expert(self.shared_width, self.config.embedding_length)}

    def block_parts(self, index: int) -> Parts:
        return self.experts.fused_parts if self.has_experts(index) else {}

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        if not self.has_experts(index):
            return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
        if self.shared_width:
            x = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu", residual=x)
        return ops.moe(h, w, self.experts, activation="silu", residual=x)
