"""Kimi Linear (Moonshot AI, arXiv 2510.26692): three layers of four are Kimi Delta Attention, the fourth latent
attention without rotation; after a dense layer, experts as DeepSeek's."""

from __future__ import annotations

from dataclasses import replace

from ..core import LayerState
from .config import Config
from .deepseek2 import DeepSeek2
from .experts import Experts
from .kda import KimiDelta
from .ops import Ops, Residual
from .weights import Shapes, Weights


class KimiLinear(DeepSeek2):
    architecture = "kimi-linear"
    examples = "Kimi Linear 48B-A3B"

    def read_config(self, vocab_size: int) -> Config:
        layers = self.meta.integer("block_count")
        self.is_latent = [bool(n) for n in self.meta.of_layers("attention.head_count_kv", layers, least=0)]
        self.meta = self.meta.with_largest("attention.head_count_kv")
        self.net = KimiDelta.from_gguf(self.meta)
        return super().read_config(vocab_size)

    def read_experts(self) -> Experts:
        return replace(super().read_experts(), normalise=True)

    def mixer_shapes(self, index: int) -> Shapes:
        hidden = self.config.embedding_length
        return self.latent.shapes(hidden) if self.is_latent[index] else self.net.shapes(hidden)

    @property
    def recurrence(self) -> KimiDelta:
        return self.net

    def state(self, index: int) -> LayerState:
        return super().state(index) if self.is_latent[index] else self.net.state

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        if not self.is_latent[index]:
            return ops.linear(ops.kda(h, w, self.net), w.attn_output, residual=x)
        a = ops.latent_attention(h, w, self.latent, rope=None, scale=self.attention_scale)
        return ops.linear(a, w.attn_output, residual=x)
