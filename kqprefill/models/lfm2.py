"""LFM2 (Liquid AI, arXiv 2511.23404): gated convolutions of a few tokens among layers of attention; dense, or in
LFM2-MoE with experts after some dense layers."""

from __future__ import annotations

from dataclasses import replace

from ..core import KeysValues, LayerState, Recurrent
from .config import Config
from .experts import Experts
from .family import Family
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class Lfm2(Family):
    """LFM2 (Liquid AI, arXiv 2511.23404): gated convolutions of a few tokens among layers of attention."""

    architecture = "lfm2"
    examples = "LFM2 1.2B, LFM2 2.6B"
    last_norm = "token_embd_norm"
    short_taps: int

    def read_config(self, vocab_size: int) -> Config:
        if not self.meta.flag("attention.causal", True):
            raise self.meta.error("attention.causal is false: its tokens see those after them, which is not supported")
        self.kv_heads = self.meta.of_layers("attention.head_count_kv", self.meta.integer("block_count"), least=0)
        self.meta = self.meta.with_largest("attention.head_count_kv")
        self.short_taps = self.meta.integer("shortconv.l_cache")
        return super().read_config(vocab_size)

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.count("attention.sliding_window") or None

    def block_shapes(self, index: int) -> Shapes:
        hidden, head_dim = self.config.embedding_length, self.config.head_dim
        shapes = super().block_shapes(index)
        if self.kv_heads[index]:
            keys = (self.kv_heads[index] * head_dim, hidden)
            return {**shapes, "attn_k": keys, "attn_v": keys, "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            del shapes[name]
        return {
            **shapes,
            "shortconv.in_proj": (3 * hidden, hidden),
            "shortconv.conv": (hidden, self.short_taps),
            "shortconv.out_proj": (hidden, hidden),
        }

    def window(self, index: int) -> int | None:
        return self.sliding_window

    def state(self, index: int) -> LayerState:
        if self.kv_heads[index]:
            return KeysValues(self.kv_heads[index], self.config.head_dim, self.window(index))
        return Recurrent(0, 0, 0, self.config.embedding_length, self.short_taps - 1)

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        if not self.kv_heads[index]:
            return ops.linear(ops.short_convolution(h, w), w.shortconv_out_proj, residual=x)
        q_norm, k_norm = w.attn_q_norm, w.attn_k_norm
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope, q_norm=q_norm, k_norm=k_norm)
        a = ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index))
        return ops.linear(a, w.attn_output, residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)


class Lfm2Moe(Lfm2):
    """LFM2 (Liquid AI, arXiv 2511.23404) with experts after some dense layers; gated convolutions of a few tokens among
    layers of attention.
    """

    architecture = "lfm2moe"
    examples = "LFM2 8B-A1B, LFM2 24B-A2B"
    experts: Experts

    def read_experts(self) -> Experts:
        self.dense_layers = self.meta.count("leading_dense_block_count")
        return replace(Experts.routed_by_metadata(self.meta, self.config, sigmoid=True), normalise=True)

    def block_shapes(self, index: int) -> Shapes:
        shapes = super().block_shapes(index)
        if index < self.dense_layers:
            return shapes
        shapes = self.experts.instead_of_dense(shapes, self.config, fused=True)
        return {**shapes, "exp_probs_b.bias=?": (self.experts.count,)}

    def block_parts(self, index: int) -> Parts:
        return {} if index < self.dense_layers else self.experts.fused_parts

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        if index < self.dense_layers:
            return super().layer(ops, w, x, index)
        x = self.mixer(ops, w, x, index)
        return ops.moe(ops.norm(x, w.ffn_norm), w, self.experts, activation="silu", residual=x)
