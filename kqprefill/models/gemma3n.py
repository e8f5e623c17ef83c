"""Gemma 3n (arXiv 2503.19786, 2301.13310): four residual streams, of which a layer computes on one and corrects all
(AltUp); a learned augmentation of that one (LAuReL, arXiv 2411.07501); sparse feed-forward networks in the first
layers; an embedding for each layer, and layers that share keys and values, as in Gemma 4."""

from __future__ import annotations

import math

from ..core import Logits, PendingHead
from .config import Config
from .gemma4 import Gemma4
from .ops import Ops, Residual
from .weights import Shapes, Weight, Weights

_STREAMS, _AUGMENTED_RANK = 4, 64  # llama.cpp, too, has these fixed (src/models/gemma3n.cpp)
_SPARSE_LAYERS, _SPARSITY, _OWN_KEYS = 10, 1.6448533535003662, 20  # where a file does not say
_SOFTCAP = 30.0


class Gemma3n(Gemma4):
    architecture = "gemma3n"
    examples = "Gemma 3n E4B, Gemma 3n E2B"

    def read_config(self, vocab_size: int) -> Config:
        layers = self.meta.integer("block_count")
        fixed = {
            "attention.shared_kv_layers": max(0, layers - _OWN_KEYS),
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [(index + 1) % 5 != 0 for index in range(layers)],
            "embedding_length_per_layer_input": 256,
        }
        for key, value in fixed.items():
            if not self.meta.has(key):
                self.meta = self.meta.replaced(key, value)
        return super().read_config(vocab_size)

    def shared_shapes(self) -> Shapes:
        hidden = self.config.embedding_length
        stack = (_STREAMS - 1, hidden, hidden)
        return {**super().shared_shapes(), "altup_proj": stack, "altup_unembd_proj": stack}

    def block_shapes(self, index: int) -> Shapes:
        hidden = self.config.embedding_length
        shapes = super().block_shapes(index)
        del shapes["layer_output_scale?"]
        return {
            **shapes,
            "laurel_l": (_AUGMENTED_RANK, hidden),
            "laurel_r": (hidden, _AUGMENTED_RANK),
            "laurel_post_norm": (hidden,),
            "altup_router": (_STREAMS, hidden),
            "altup_router_norm": (hidden,),
            "altup_predict_coef": (_STREAMS * _STREAMS, _STREAMS),
            "altup_correct_coef": (_STREAMS, _STREAMS),
            "altup_correct_scale": (hidden,),
        }

    def other_matrices(self) -> list[Weight]:
        return [*super().other_matrices(), self.shared.altup_proj, self.shared.altup_unembd_proj]

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        meta, layers = self.meta, self.config.block_count
        if meta.integer("altup.num_inputs", _STREAMS) != _STREAMS or meta.count("altup.active_idx"):
            raise meta.error(f"altup: other than {_STREAMS} streams, the first of them active, is not supported")
        self.final_softcap = _SOFTCAP
        self.sparsity = [_SPARSITY if index < _SPARSE_LAYERS else None for index in range(layers)]
        if meta.has("activation_sparsity_scale"):
            self.sparsity = [s if math.isfinite(s) else None for s in meta.numbers("activation_sparsity_scale", layers)]

    def residual_shape(self, tokens: int) -> tuple[int, ...]:
        return _STREAMS, *super().residual_shape(tokens)

    def embed(self, ops: Ops) -> Residual:
        return ops.altup_streams(super().embed(ops), self.shared.altup_proj)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        streams, x = ops.altup_predict(x, w)
        h = ops.norm(x, w.attn_norm)
        # (x + laurel + attention) / sqrt(2), where laurel is h, the norm of x, and what is augmented to it.
        x = ops.add_rms_norm(x, x, w.attn_norm)
        x = ops.add_rms_norm(x, ops.linear(ops.projected(h, w.laurel_l), w.laurel_r), w.laurel_post_norm)
        a = ops.linear(self.attention(ops, w, h, index), w.attn_output)
        x = ops.add_rms_norm(x, a, w.post_attention_norm, 1 / math.sqrt(2))
        h, gate, up, down = ops.norm(x, w.ffn_norm), w.ffn_gate, w.ffn_up, w.ffn_down
        m = ops.mlp(h, gate, up, down, activation="gelu_tanh", sparsity=self.sparsity[index])
        return ops.altup_correct(streams, ops.add_rms_norm(x, m, w.post_ffw_norm), w)

    def finish(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        return super().finish(ops, ops.altup_merge(x, self.shared.altup_unembd_proj), logits)
