"""Falcon-H1 (arXiv 2507.22448): in each layer attention and Mamba-2 side by side, of the same input."""

from __future__ import annotations

from ..core import LayerState, Several
from .config import Config
from .family import Family
from .mamba2 import Mamba2
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class FalconH1(Family):
    architecture = "falcon-h1"
    examples = "Falcon-H1 34B, Falcon-H1 7B, Falcon-H1 1.5B"
    by_rows_after_attention = False  # Mamba-2 beside it needs them

    def read_config(self, vocab_size: int) -> Config:
        self.net = Mamba2.from_gguf(self.meta)
        return super().read_config(vocab_size)

    def block_shapes(self, index: int) -> Shapes:
        shapes = {**super().block_shapes(index), **self.net.shapes(self.config.embedding_length)}
        shapes["ffn_norm="] = shapes.pop("ffn_norm")  # files call it so, without .weight
        return shapes

    def block_parts(self, index: int) -> Parts:
        return self.net.parts

    @property
    def recurrence(self) -> Mamba2:
        return self.net

    def state(self, index: int) -> LayerState:
        return Several((super().state(index), self.net.state))

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        x = ops.linear(ops.mamba2(h, w, self.net), w.ssm_out, residual=x)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
