"""SmolLM3 (huggingface.co/blog/smollm3): Llama's layers, every fourth without rotary embedding (NoPE, arXiv
2501.18795)."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Weights

_NOPE_EVERY = 4


class SmolLM3(Family):
    architecture = "smollm3"
    examples = "SmolLM3 3B"
    rope_interleaved = True  # as Llama's

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        rope = None if (index + 1) % _NOPE_EVERY == 0 else self.rope
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=rope)
        x = ops.linear(ops.attention(q, k, v, scale=self.attention_scale), w.attn_output, residual=x)
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
