"""Granite 3 with experts (ibm-granite): Granite's layers, of which each token goes through a few of many networks, and
perhaps through one that is for all."""

from __future__ import annotations

from dataclasses import replace

from .experts import Experts, shared_expert
from .granite import Granite
from .ops import Ops, Residual
from .weights import Shapes, Weights


class GraniteMoe(Granite):
    architecture = "granitemoe"
    experts: Experts

    def read_experts(self) -> Experts:
        self.shared_width = self.meta.count("expert_shared_feed_forward_length")
        experts = Experts.from_gguf(self.meta, self.config, normalise=True)
        return replace(experts, width=self.config.feed_forward_length)

    def block_shapes(self, index: int) -> Shapes:
        shapes = self.experts.instead_of_dense(super().block_shapes(index), self.config, fused=True)
        return {**shapes, **shared_expert(self.shared_width, self.config.embedding_length)}

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.attended(ops, w, x)
        h = ops.rms_norm(x, w.ffn_norm)
        if self.shared_width:
            gate, up, down = w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp
            x = ops.mlp(h, gate, up, down, activation="silu", residual=x, scale=self.residual_scale)
        return ops.moe(h, w, replace(self.experts, scale=self.residual_scale), activation="silu", residual=x)
