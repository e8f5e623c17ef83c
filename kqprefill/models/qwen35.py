"""Qwen 3.5 and 3.6: three layers of four are a Gated DeltaNet (arXiv 2412.06464), the fourth attention whose output is
gated head by head; dense, or with experts."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from ..core import LayerState
from .config import ArchMetadata, Rope
from .delta_net import DeltaNet
from .experts import Experts, shared_expert
from .family import Family
from .ops import Ops, Residual
from .qwen3vl import text_rope
from .weights import Parts, Shapes, Weights


def recurrent_layers(meta: ArchMetadata, layers: int) -> list[bool]:
    """Which layers are a recurrence: as the file lists them, or all but every fourth."""
    if meta.has("attention.recurrent_layers"):
        return meta.flags("attention.recurrent_layers", at_least=layers)
    interval = meta.integer("full_attention_interval", 4)
    return [(index + 1) % interval != 0 for index in range(layers)]


class Qwen35(Family):
    """Qwen 3.5 and 3.6: three layers of four are a Gated DeltaNet (arXiv 2412.06464), the fourth attention whose output
    is gated head by head.
    """

    architecture = "qwen35"
    examples = "Qwen 3.6 27B, Qwen 3.5 9B"
    by_turns = True  # value heads use key heads by turns: the converter has reordered them

    @cached_property
    def net(self) -> DeltaNet:
        """The recurrent layers' sizes."""
        return DeltaNet.from_gguf(self.meta, by_turns=self.by_turns)

    @cached_property
    def recurrent(self) -> list[bool]:
        """Which layers are a recurrence."""
        return recurrent_layers(self.meta, self.config.block_count)

    def mixer_shapes(self, index: int) -> Shapes:
        """The tensors of a layer's first half, but its norm."""
        c, head = self.config, (self.config.head_dim,)
        if self.recurrent[index]:
            return self.net.shapes(c.embedding_length)
        return {
            "attn_q": (2 * c.q_width, c.embedding_length),
            "attn_k": (c.kv_width, c.embedding_length),
            "attn_v": (c.kv_width, c.embedding_length),
            "attn_q_norm": head,
            "attn_k_norm": head,
            "attn_output": (c.embedding_length, c.q_width),
        }

    def block_shapes(self, index: int) -> Shapes:
        width = (self.config.embedding_length,)
        feed_forward = {n: s for n, s in super().block_shapes(index).items() if n in ("ffn_gate", "ffn_up", "ffn_down")}
        return {"attn_norm": width, "post_attention_norm": width, **self.mixer_shapes(index), **feed_forward}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.rope = self.rotated(self.rope)

    def rotated(self, rope: Rope) -> Rope:
        """How text is rotated, of the file's rotary embedding."""
        return text_rope(rope, self.meta)

    @property
    def recurrence(self) -> DeltaNet:
        return self.net

    def state(self, index: int) -> LayerState:
        return self.net.state if self.recurrent[index] else super().state(index)

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        if self.recurrent[index]:
            return ops.linear(ops.delta_net(h, w, self.net), w.ssm_out, residual=x)
        norms = {"q_norm": w.attn_q_norm, "k_norm": w.attn_k_norm}
        q, k, v, gate = ops.gated_qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope, **norms)
        a = ops.gated(ops.attention(q, k, v, scale=self.attention_scale), gate)
        return ops.linear(a, w.attn_output, residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.post_attention_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)


class Qwen35Moe(Qwen35):
    """Qwen 3.5 and 3.6 with experts, beside one that every token goes through under a gate; three layers of four are a
    Gated DeltaNet (arXiv 2412.06464).
    """

    architecture = "qwen35moe"
    examples = "Qwen 3.6 35B-A3B, Qwen 3.5 122B-A10B, Qwen 3.5 397B-A17B"
    experts: Experts

    def read_experts(self) -> Experts:
        return replace(Experts.from_gguf(self.meta, self.config), normalise=True)

    def block_shapes(self, index: int) -> Shapes:
        c = self.config
        shared = self.meta.integer("expert_shared_feed_forward_length")
        return {
            **self.experts.instead_of_dense(super().block_shapes(index), c, fused=True),
            "ffn_gate_inp_shexp": (c.embedding_length,),
            **shared_expert(shared, c.embedding_length),
        }

    def block_parts(self, index: int) -> Parts:
        return self.experts.fused_parts

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.post_attention_norm)
        shared = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu")
        both = shared, w.ffn_gate_inp_shexp
        return ops.moe(h, w, self.experts, activation="silu", residual=x, shared=both)
