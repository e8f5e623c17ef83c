"""Nemotron-H and Nemotron 3 (arXiv 2504.03624, 2512.20848): each layer is one of Mamba-2, attention without rotation,
and a feed-forward network. That has no gate, or it is experts, which may work on fewer values than a token has."""

from __future__ import annotations

from dataclasses import replace

from ..core import KeysValues, LayerState, Several
from .config import Config
from .experts import Experts
from .family import Family
from .mamba2 import Mamba2
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights


class NemotronH(Family):
    """Nemotron-H and Nemotron Nano 2 (arXiv 2504.03624): each layer is one of Mamba-2, attention without rotation, and
    a feed-forward network without a gate.
    """

    architecture = "nemotron_h"
    examples = "Nemotron Nano 9B v2, Nemotron-H 8B"

    def read_config(self, vocab_size: int) -> Config:
        meta, layers = self.meta, self.meta.integer("block_count")
        self.kv_heads = meta.of_layers("attention.head_count_kv", layers, least=0)
        self.widths = meta.of_layers("feed_forward_length", layers, least=0)
        self.net = Mamba2.from_gguf(meta)
        self.meta = meta.with_largest("attention.head_count_kv", "feed_forward_length")
        epsilon = "attention.layer_norm_rms_epsilon"
        if not meta.has(epsilon):
            self.meta = self.meta.replaced(epsilon, meta.number("attention.layer_norm_epsilon"))
        return super().read_config(vocab_size)

    def kind(self, index: int) -> str:
        """What a layer is: "feed-forward", "attention" or "mamba2"."""
        if self.widths[index]:
            return "feed-forward"
        return "attention" if self.kv_heads[index] else "mamba2"

    def block_shapes(self, index: int) -> Shapes:
        c, kind = self.config, self.kind(index)
        norm: Shapes = {"attn_norm": (c.embedding_length,)}
        if kind == "feed-forward":
            return {**norm, **self.feed_forward_shapes(index)}
        if kind == "mamba2":
            return {**norm, **self.net.shapes(c.embedding_length)}
        keys = self.kv_heads[index] * c.head_dim, c.embedding_length
        output = c.embedding_length, c.q_width
        return {**norm, "attn_q": output[::-1], "attn_k": keys, "attn_v": keys, "attn_output": output}

    def block_parts(self, index: int) -> Parts:
        return self.net.parts if self.kind(index) == "mamba2" else {}

    def feed_forward_shapes(self, index: int) -> Shapes:
        """The tensors of a feed-forward layer, but its norm."""
        hidden, width = self.config.embedding_length, self.widths[index]
        return {"ffn_up": (width, hidden), "ffn_down": (hidden, width)}

    @property
    def recurrence(self) -> Mamba2:
        return self.net

    def state(self, index: int) -> LayerState:
        if self.kind(index) == "attention":
            return KeysValues(self.kv_heads[index], self.config.head_dim)
        return self.net.state if self.kind(index) == "mamba2" else Several()

    def feed_forward(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A feed-forward layer."""
        return ops.mlp(ops.norm(x, w.attn_norm), None, w.ffn_up, w.ffn_down, activation="relu_squared", residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        kind = self.kind(index)
        if kind == "feed-forward":
            return self.feed_forward(ops, w, x, index)
        h = ops.norm(x, w.attn_norm)
        if kind == "mamba2":
            return ops.linear(ops.mamba2(h, w, self.net), w.ssm_out, residual=x)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=None)
        return ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)


class NemotronHMoe(NemotronH):
    """Nemotron 3 (arXiv 2512.20848): each layer is one of Mamba-2, attention without rotation, and experts without
    gates, which may work on fewer values than a token has.
    """

    architecture = "nemotron_h_moe"
    examples = "Nemotron 3 Nano 30B-A3B, Nemotron 3 Super 120B-A12B"
    experts: Experts

    def read_experts(self) -> Experts:
        meta, layers = self.meta, self.meta.integer("block_count")
        self.used, self.expert_widths = meta.of_layers("expert_used_count", layers, least=0), self.widths
        self.latent = meta.count("moe_latent_size") or self.config.embedding_length
        self.shared_width = meta.count("expert_shared_feed_forward_length")
        meta, width = meta.with_largest("expert_used_count"), "expert_feed_forward_length"
        if self.meta.has(width):
            self.expert_widths = self.meta.of_layers(width, layers, least=0)
        else:  # older files do not say how wide an expert is
            self.expert_widths = [self.widths[i] // self.used[i] if self.used[i] else 0 for i in range(layers)]
        meta = meta.replaced(width, max(self.expert_widths))
        return replace(Experts.routed_by_metadata(meta, self.config, sigmoid=True), gated=False)

    def experts_of(self, index: int) -> Experts:
        """A layer's experts."""
        return replace(self.experts, used=self.used[index], width=self.expert_widths[index])

    def feed_forward_shapes(self, index: int) -> Shapes:
        hidden, latent, experts = self.config.embedding_length, self.latent, self.experts_of(index)
        shapes: Shapes = {
            "ffn_gate_inp": (experts.count, hidden),
            "exp_probs_b.bias=?": (experts.count,),
            "ffn_up_exps": (experts.count, experts.width, latent),
            "ffn_down_exps": (experts.count, latent, experts.width),
        }
        if self.shared_width:
            shapes |= {"ffn_up_shexp": (self.shared_width, hidden), "ffn_down_shexp": (hidden, self.shared_width)}
        if latent != hidden:
            shapes |= {"ffn_latent_down": (latent, hidden), "ffn_latent_up": (hidden, latent)}
        return shapes

    def feed_forward(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        h, experts, activation = ops.norm(x, w.attn_norm), self.experts_of(index), "relu_squared"
        if self.shared_width:
            x = ops.mlp(h, None, w.ffn_up_shexp, w.ffn_down_shexp, activation=activation, residual=x)
        if self.latent == self.config.embedding_length:
            return ops.moe(h, w, experts, activation=activation, residual=x)
        scores = ops.linear(h, w.ffn_gate_inp)
        u = ops.projected(h, w.ffn_latent_down)
        made = ops.moe(u, w, experts, activation=activation, scores=scores)
        return ops.linear(ops.cast(made), w.ffn_latent_up, residual=x)
