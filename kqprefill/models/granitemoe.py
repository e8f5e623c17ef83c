"""Granite 3 with experts (ibm-granite): Granite's layers, of which each token goes through a few of many networks, and
perhaps through one that is for all."""

from __future__ import annotations

from dataclasses import replace

from .experts import Experts, shared_expert
from .granite import Granite
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class GraniteMoe(Granite):
    architecture = "granitemoe"
    examples = "Granite 3.1 3B-A800M, Granite 3.1 1B-A400M"

    def read_experts(self) -> Experts | None:
        self.shared_width = self.meta.count("expert_shared_feed_forward_length")
        experts = Experts.from_gguf(self.meta, self.config, normalise=True)
        return replace(experts, width=self.config.feed_forward_length)

    def block_shapes(self, index: int) -> Shapes:
        shapes = super().block_shapes(index)
        if self.experts is None:
            return shapes
        shapes = self.experts.instead_of_dense(shapes, self.config, fused=True)
        return {**shapes, **shared_expert(self.shared_width, self.config.embedding_length)}

    def block_parts(self, index: int) -> Parts:
        return {} if self.experts is None else self.experts.fused_parts

    def feed_forward(self, ops: Ops, w: Weights, x: Residual) -> Residual:
        if self.experts is None:
            return super().feed_forward(ops, w, x)
        h = ops.norm(x, w.ffn_norm)
        if self.shared_width:
            gate, up, down = w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp
            x = ops.mlp(h, gate, up, down, activation="silu", residual=x, scale=self.residual_scale)
        return ops.moe(h, w, replace(self.experts, scale=self.residual_scale), activation="silu", residual=x)
