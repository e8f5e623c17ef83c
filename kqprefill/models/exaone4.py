"""EXAONE 4 (arXiv 2507.11407): norms after each half of a layer only, and of q and k head by head. In the 32B, layers
of sliding-window attention with rotation among those of full attention without."""

from __future__ import annotations

from .family import Family
from .ops import Ops, Residual
from .weights import Shapes, Weights

_HYBRID_LAYERS = 64  # llama.cpp, too, knows the 32B by the number of its layers


class Exaone4(Family):
    architecture = "exaone4"
    examples = "EXAONE 4.0 32B, EXAONE 4.0 1.2B"

    def block_shapes(self, index: int) -> Shapes:
        width, head = (self.config.embedding_length,), (self.config.head_dim,)
        shapes = {n: s for n, s in super().block_shapes(index).items() if n not in ("attn_norm", "ffn_norm")}
        norms = {"attn_q_norm": head, "attn_k_norm": head, "post_attention_norm": width, "post_ffw_norm": width}
        return {**shapes, **norms}

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        count, key = self.config.block_count, "attention.sliding_window_pattern"
        self.windowed = [False] * count
        if count == _HYBRID_LAYERS:
            given = self.meta.has(key)
            self.windowed = self.meta.flags(key, count) if given else [(i + 1) % 4 != 0 for i in range(count)]
            self.sliding_window = self.meta.integer("attention.sliding_window")

    def window(self, index: int) -> int | None:
        return self.sliding_window if self.windowed[index] else None

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        window = self.window(index)
        rope = self.rope if window is not None or self.config.block_count != _HYBRID_LAYERS else None
        h, q_norm, k_norm = ops.cast(x), w.attn_q_norm, w.attn_k_norm
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=rope, q_norm=q_norm, k_norm=k_norm)
        a = ops.linear(ops.attention(q, k, v, scale=self.attention_scale, window=window), w.attn_output)
        x = ops.add_rms_norm(x, a, w.post_attention_norm)
        m = ops.mlp(ops.cast(x), w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu")
        return ops.add_rms_norm(x, m, w.post_ffw_norm)
