"""DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash (arXiv 2405.04434, 2412.19437): multi-head latent attention; after
some dense layers, experts beside one that every token goes through."""

from __future__ import annotations

from dataclasses import replace
import math

from ..core import LayerState
from .config import LARGEST, SMALLEST, Config
from .experts import Experts, shared_expert
from .family import Family
from .latent import LatentAttention
from .ops import Ops, Residual
from .weights import Parts, Shapes, Weights

_GLM_FLASH = 154880  # GLM-4.7-Flash's vocabulary: its first files do not say that its experts are chosen by sigmoids


class DeepSeek2(Family):
    architecture = "deepseek2"
    examples = "DeepSeek V3, DeepSeek R1, DeepSeek V2-Lite, Kimi K2, GLM-4.7-Flash"
    rope_interleaved = True
    experts: Experts

    def read_config(self, vocab_size: int) -> Config:
        self.latent = LatentAttention.from_gguf(self.meta)
        config = Config.from_gguf(self.meta, vocab_size, head_dim=self.latent.head_dim)
        return replace(config, head_count_kv=config.head_count)  # each head has its own, once they are made

    def read_experts(self) -> Experts:
        c = self.config
        self.dense_layers = self.meta.count("leading_dense_block_count")
        blocks = c.block_count + c.nextn_predict_layers
        sigmoid = c.vocab_size == _GLM_FLASH and blocks in (47, 48)
        return Experts.routed_by_metadata(self.meta, c, sigmoid=sigmoid)

    def block_shapes(self, index: int) -> Shapes:
        c, width = self.config, (self.config.embedding_length,)
        dense = {n: s for n, s in super().block_shapes(index).items() if n in ("ffn_gate", "ffn_up", "ffn_down")}
        shapes = {"attn_norm": width, **self.mixer_shapes(index), "ffn_norm": width, **dense}
        if index < self.dense_layers:
            return shapes
        shared = self.experts.width * self.meta.integer("expert_shared_count")
        shapes = self.experts.instead_of_dense(shapes, c, fused=True)
        return {**shapes, "exp_probs_b.bias=?": (self.experts.count,), **shared_expert(shared, c.embedding_length)}

    def mixer_shapes(self, index: int) -> Shapes:
        """The tensors of a layer's first half, but its norm."""
        return self.latent.shapes(self.config.embedding_length)

    def block_parts(self, index: int) -> Parts:
        return {} if index < self.dense_layers else self.experts.fused_parts

    def head_dims(self, index: int) -> tuple[int, int]:
        return self.latent.head_dim, self.latent.value_dim

    def state(self, index: int) -> LayerState:
        return self.latent.state

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        meta = self.meta
        if meta.string("rope.scaling.type", "none") == "yarn":
            self._read_temperatures()
        if meta.has("attention.temperature_scale"):
            beta = meta.number("attention.temperature_scale")
            self.rope = replace(self.rope, beta=beta, beta_length=meta.integer("attention.temperature_length"))

    def _read_temperatures(self) -> None:
        """YaRN's: what the rotated elements, and the scores, are multiplied by.

        rope.scaling.yarn_log_multiplier is a tenth of DeepSeek's mscale_all_dim, and means that only the scores are.
        """
        meta, growth = self.meta, math.log(self.meta.number("rope.scaling.factor", 1.0))
        factor, multiplier = meta.number("rope.scaling.attn_factor", 1.0), 0.1
        if meta.has("rope.scaling.yarn_log_multiplier"):
            multiplier = meta.number("rope.scaling.yarn_log_multiplier")
            self.rope = replace(self.rope, magnitude=factor)
        temperature = factor * (1 + multiplier * growth)
        self.attention_scale *= temperature * temperature
        if not SMALLEST <= self.attention_scale <= LARGEST:
            raise meta.error("rope.scaling's factors contradict: the scale of attention's scores is not finite")

    def mixer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """A layer's first half."""
        h = ops.norm(x, w.attn_norm)
        a = ops.latent_attention(h, w, self.latent, rope=self.rope, scale=self.attention_scale)
        return ops.linear(a, w.attn_output, residual=x)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        x = self.mixer(ops, w, x, index)
        h = ops.norm(x, w.ffn_norm)
        if index < self.dense_layers:
            return ops.mlp(h, w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu", residual=x)
        x = ops.mlp(h, w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp, activation="silu", residual=x)
        return ops.moe(h, w, self.experts, activation="silu", residual=x)
