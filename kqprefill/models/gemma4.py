"""Gemma 4: layers of sliding-window attention with heads of their own size among those of full attention, values that
are normalised and may be the keys; in the small models, an embedding for each layer and layers that share keys and
values; with experts, these beside one network that every token goes through."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
import math

from ..core import KeysValues, LayerState, Logits, PendingHead, SharedKeysValues
from .config import Config, read_rope
from .experts import Experts
from .gemma import Gemma
from .ops import Input, Ops, Residual
from .weights import Parts, Shapes, Weight, Weights


class Gemma4(Gemma):
    architecture = "gemma4"
    examples = "Gemma 4 31B, Gemma 4 26B-A4B, Gemma 4 E4B"
    by_rows_after_attention = False  # embeddings for the layers, and Gemma 3n's streams, are of all

    def read_config(self, vocab_size: int) -> Config:
        """Of numbers that differ by layer, the largest."""
        widest = self.meta.with_largest("attention.head_count_kv", "feed_forward_length")
        return Config.from_gguf(widest, vocab_size)

    def read_experts(self) -> Experts | None:
        if not self.meta.count("expert_count"):
            return None
        return replace(Experts.from_gguf(self.meta, self.config), normalise=True)

    @cached_property
    def windowed(self) -> list[bool]:
        """Which layers see a window of the sequence."""
        return self.meta.flags("attention.sliding_window_pattern", at_least=self.config.block_count)

    @cached_property
    def kv_heads(self) -> list[int]:
        """How many heads of keys and values each layer has."""
        c, key = self.config, "attention.head_count_kv"
        each = self.meta.of_layers(key, c.block_count, c.head_count)
        if any(c.head_count % heads for heads in each):
            raise self.meta.error(f"attention.head_count {c.head_count} is not a multiple of every head_count_kv")
        return each

    @cached_property
    def widths(self) -> list[int]:
        """How wide each layer's feed-forward network is."""
        return self.meta.of_layers("feed_forward_length", self.config.block_count)

    @cached_property
    def input_width(self) -> int:
        """Values of a token's embedding for one layer; 0 where there are none."""
        return self.meta.count("embedding_length_per_layer_input")

    @cached_property
    def window_head_dim(self) -> int:
        """The size of heads in layers with a window."""
        size = self.meta.integer("attention.key_length_swa", self.config.head_dim)
        if self.meta.integer("attention.value_length_swa", size) != size:
            raise self.meta.error("attention.value_length_swa differs from key_length_swa, which is not supported")
        return size

    @cached_property
    def sources(self) -> list[int]:
        """The layer whose keys and values each layer sees: its own, or for the last shared_kv_layers the last of its
        kind that has some."""
        count = self.config.block_count
        own = max(0, count - self.meta.count("attention.shared_kv_layers"))
        last = {self.windowed[index]: index for index in range(own)}
        if any(self.windowed[index] not in last for index in range(own, count)):
            raise self.meta.error("attention.shared_kv_layers leaves a kind of layer without keys and values")
        return [index if index < own else last[self.windowed[index]] for index in range(count)]

    def head_dims(self, index: int) -> tuple[int, int]:
        size = self.window_head_dim if self.windowed[index] else self.config.head_dim
        return size, size

    def shared_shapes(self) -> Shapes:
        c, width = self.config, self.input_width
        if not width:
            return super().shared_shapes()
        return {
            **super().shared_shapes(),
            "per_layer_token_embd": (c.vocab_size, width * c.block_count),
            "per_layer_model_proj": (width * c.block_count, c.embedding_length),
            "per_layer_proj_norm": (width,),
        }

    def block_shapes(self, index: int) -> Shapes:
        hidden, width, (head, _) = self.config.embedding_length, self.widths[index], self.head_dims(index)
        q_width, kv_width = self.config.head_count * head, self.kv_heads[index] * head
        shapes: Shapes = {"attn_norm": (hidden,), "attn_q_norm": (head,), "attn_q": (q_width, hidden)}
        if self.sources[index] == index:
            shapes |= {"attn_k_norm": (head,), "attn_k": (kv_width, hidden), "attn_v?": (kv_width, hidden)}
        shapes |= {
            "attn_output": (hidden, q_width),
            "post_attention_norm": (hidden,),
            "ffn_norm": (hidden,),
            "post_ffw_norm": (hidden,),
            "ffn_gate": (width, hidden),
            "ffn_up": (width, hidden),
            "ffn_down": (hidden, width),
            "layer_output_scale?": (1,),
        }
        if self.experts is not None:
            shapes |= self.experts.instead_of_dense({"ffn_gate": ()}, self.config, fused=True)
            shapes |= {"ffn_gate_inp.scale=": (hidden,), "ffn_down_exps.scale=": (self.experts.count,)}
            shapes |= {"pre_ffw_norm_2": (hidden,), "post_ffw_norm_1": (hidden,), "post_ffw_norm_2": (hidden,)}
        if self.input_width:
            shapes |= {"inp_gate": (self.input_width, hidden), "proj": (hidden, self.input_width)}
            shapes |= {"post_norm": (hidden,)}
        return shapes

    def other_matrices(self) -> list[Weight]:
        return [self.shared.per_layer_model_proj] if self.input_width else []

    def row_table(self) -> Weight | None:
        return self.shared.get("per_layer_token_embd")

    def block_parts(self, index: int) -> Parts:
        return {} if self.experts is None else self.experts.fused_parts

    def leaves(self, name: str) -> bool:
        """Also what would make keys and values in layers that share others'."""
        prefix, _, rest = name.partition(".")
        number, _, own = rest.partition(".")
        if prefix == "blk" and number in self._sharing and own.startswith(("attn_k.", "attn_v.", "attn_k_norm.")):
            return True
        return super().leaves(name)

    @cached_property
    def _sharing(self) -> frozenset[str]:
        """The numbers of layers without keys and values of their own."""
        return frozenset(str(index) for index, source in enumerate(self.sources) if source != index)

    def read_hyper_parameters(self) -> None:
        self.rope_global = self.read_rope()
        size = self.window_head_dim
        meta = self.meta.replaced("rope.dimension_count", self.meta.integer("rope.dimension_count_swa", size))
        base = self.meta.number("rope.freq_base_swa", 10000.0)
        self.rope_local = read_rope(meta, size, interleaved=False, base=base, scaled=False)
        self.sliding_window = self.meta.integer("attention.sliding_window") if any(self.windowed) else None
        has_softcap = self.meta.has("final_logit_softcapping")
        self.final_softcap = self.meta.number("final_logit_softcapping") if has_softcap else None
        self.attention_scale = 1.0  # q and k are normalised

    def window(self, index: int) -> int | None:
        return self.sliding_window if self.windowed[index] else None

    def state(self, index: int) -> LayerState:
        if self.sources[index] != index:
            return SharedKeysValues(self.sources[index])
        return KeysValues(self.kv_heads[index], self.head_dims(index)[0], self.window(index))

    def embed(self, ops: Ops) -> Residual:
        x = super().embed(ops)
        if self.input_width:
            own = self.shared
            ops.embed_for_layers(x, own.per_layer_token_embd, own.per_layer_model_proj, own.per_layer_proj_norm)
        return x

    def attention(self, ops: Ops, w: Weights, h: Input, index: int) -> Input:
        """A layer's attention, between the norm before it and its output matrix."""
        q, k, v = ops.qkv(
            h,
            w.attn_q,
            w.get("attn_k"),
            w.get("attn_v"),
            rope=self.rope_local if self.windowed[index] else self.rope_global,
            q_norm=w.attn_q_norm,
            k_norm=w.get("attn_k_norm"),
            v_normed=True,
        )
        return ops.attention(q, k, v, scale=self.attention_scale, window=self.window(index))

    def add_networks(self, ops: Ops, w: Weights, x: Residual, factor: Weight | None) -> Residual:
        """factor * (x + what a layer's networks make of x)."""
        m = ops.mlp(ops.norm(x, w.ffn_norm), w.ffn_gate, w.ffn_up, w.ffn_down, activation="gelu_tanh")
        if self.experts is None:
            return ops.add_rms_norm(x, m, w.post_ffw_norm, factor)
        scale = 1 / math.sqrt(self.config.embedding_length)
        scores = ops.router_scores(x, w.ffn_gate_inp_scale, w.ffn_gate_inp, scale)
        e = ops.moe(ops.norm(x, w.pre_ffw_norm_2), w, self.experts, activation="gelu_tanh", scores=scores)
        return ops.add_norm_of_norms(x, m, w.post_ffw_norm_1, e, w.post_ffw_norm_2, w.post_ffw_norm, factor)

    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        a = self.attention(ops, w, ops.norm(x, w.attn_norm), index)
        x = ops.add_rms_norm(x, ops.linear(a, w.attn_output), w.post_attention_norm)
        factor = w.get("layer_output_scale")
        if not self.input_width:
            return self.add_networks(ops, w, x, factor)
        x = self.add_networks(ops, w, x, None)
        return ops.add_gated_embedding(x, w.inp_gate, w.proj, w.post_norm, factor)

    def head(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        return ops.head(x, self.output_norm, self.output, logits, softcap=self.final_softcap)
