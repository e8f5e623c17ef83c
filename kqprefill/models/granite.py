"""Granite 3 (ibm-granite): Llama's layers with multipliers on the embedding, attention's scores, what is added to the
residual stream, and the logits (muP, arXiv 2203.03466)."""

from __future__ import annotations

from ..core import Logits, PendingHead
from .family import Family
from .ops import Ops, Residual
from .weights import Weights


class Granite(Family):
    architecture = "granite"
    examples = "Granite 3.3 8B, Granite 3.3 2B"
    rope_interleaved = True  # as Llama's
    rotated = True

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.attention_scale = self.meta.number("attention.scale", self.attention_scale)
        embedding, residual, logits = self.default_scales()
        self.embedding_scale = self.meta.number("embedding_scale", embedding)
        self.residual_scale = self.meta.number("residual_scale", residual)
        self.logit_scale = 1 / self.meta.number("logit_scale", logits)
        added = "attn_output.weight", "ffn_down.weight", "ssm_out.weight"
        if any(w.bias is not None and w.name.endswith(added) for block in self.blocks for w in block):
            raise self.meta.error(
                "biases on what is added to the residual stream are not supported beside residual_scale"
            )

    def default_scales(self) -> tuple[float, float, float]:
        """Of the embedding, of what is added, and by what logits are divided, where the file does not say."""
        return 1.0, 1.0, 1.0

    def embed(self, ops: Ops) -> Residual:
        return ops.embed(self.token_embd, scale=self.embedding_scale)

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        q, k, v = ops.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=self.rope if self.rotated else None)
        a = ops.attention(q, k, v, scale=self.attention_scale)
        return ops.linear(a, w.attn_output, residual=x, scale=self.residual_scale)

    def feed_forward(self, ops: Ops, w: Weights, x: Residual) -> Residual:
        """A layer's second half."""
        h = ops.norm(x, w.ffn_norm)
        return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x, scale=self.residual_scale)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        return self.feed_forward(ops, w, self.mixer(ops, w, x, index))

    def head(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        return ops.head(x, self.output_norm, self.output, logits, scale=self.logit_scale)
