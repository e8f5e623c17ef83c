"""Granite 4 hybrids (ibm-granite): Granite's layers, most of them with Mamba-2 in the place of attention; with experts
or without; most files without rotation."""

from __future__ import annotations

from ..core import KeysValues, LayerState
from .config import Config
from .experts import Experts
from .granitemoe import GraniteMoe
from .mamba2 import Mamba2
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class GraniteHybrid(GraniteMoe):
    architecture = "granitehybrid"
    examples = "Granite 4.0 H-Tiny, Granite 4.0 H-Small, Granite 4.0 H-Micro"

    def read_config(self, vocab_size: int) -> Config:
        self.kv_heads = self.meta.of_layers("attention.head_count_kv", self.meta.integer("block_count"), least=0)
        self.net = Mamba2.from_gguf(self.meta)
        self.rotated = self.meta.flag("rope.scaling.finetuned", True)
        self.meta = self.meta.with_largest("attention.head_count_kv")
        return super().read_config(vocab_size)

    def read_experts(self) -> Experts | None:
        return super().read_experts() if self.meta.count("expert_count") else None

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shapes = super().block_shapes(index)
        if self.kv_heads[index]:
            keys = self.kv_heads[index] * c.head_dim, c.embedding_length
            return {**shapes, "attn_k": keys, "attn_v": keys}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            del shapes[name]
        return {**shapes, **self.net.shapes(c.embedding_length)}

    def block_parts(self, index: int) -> Parts:
        return super().block_parts(index) | ({} if self.kv_heads[index] else self.net.parts)

    @property
    def recurrence(self) -> Mamba2:
        return self.net

    def state(self, index: int) -> LayerState:
        heads = self.kv_heads[index]
        return KeysValues(heads, self.config.head_dim) if heads else self.net.state

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        if self.kv_heads[index]:
            return super().mixer(ops, w, x, index)
        y = ops.mamba2(ops.norm(x, w.attn_norm), w, self.net)
        return ops.linear(y, w.ssm_out, residual=x, scale=self.residual_scale)
