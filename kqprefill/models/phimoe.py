"""Phi 3.5 with experts (arXiv 2404.14219): Phi 3's layers with biases everywhere, also on the norms, and two experts of
many for each token. (llama.cpp has RMSNorm where the original has LayerNorm.)"""

from __future__ import annotations

from dataclasses import replace

from .experts import Experts
from .ops import Ops, Residual
from .phi3 import Phi3
from .weights import Parts, Shapes, Weights


class PhiMoe(Phi3):
    architecture = "phimoe"
    examples = "Phi 3.5 MoE"
    last_norm = "output_norm+"
    experts: Experts

    def read_experts(self) -> Experts:
        experts = Experts.from_gguf(self.meta, self.config, normalise=True)
        return replace(experts, width=self.config.feed_forward_length)

    def block_shapes(self, index: int) -> Shapes:
        shapes = {f"{n}+" if n.endswith("_norm") else n: s for n, s in super(Phi3, self).block_shapes(index).items()}
        return self.experts.instead_of_dense(shapes, self.config)

    def block_parts(self, index: int) -> Parts:
        return {}

    def window(self, index: int) -> int | None:
        return None  # as llama.cpp, which reads none of this architecture

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        return ops.moe(ops.norm(x, w.ffn_norm), w, self.experts, activation="silu", residual=x)
