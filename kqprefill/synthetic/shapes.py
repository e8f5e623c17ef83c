"""The published sizes of some models, and the recipes that say which ggml type each of a file's tensors has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
import re
from typing import Any, TypeAlias

from ..gguf.dequantize import SUPPORTED
from ..gguf.types import GGML, GGML_QUANT_SIZES

# The type of a matrix, by its GGUF name (without `blk.N.` and `.weight`) and its layer's number (0 outside the layers).
TypeOf: TypeAlias = Callable[[str, int], GGML]


@dataclass(frozen=True)
class Shape:
    """A model's published sizes.

    window: of sliding-window attention; 0 for none. yarn: how many times as long YaRN makes the context, which is then
    `context`; 0 for none. experts: of a layer, each of width ffn; 0 for one feed-forward network. used: experts that
    a token goes through. more: other metadata under the architecture's name; None for what it does not have. optional:
    pattern of the tensors (full GGUF names) that the model has and its family's files may lack, beside those that are
    known of the architecture.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_base: float
    tied: bool = False
    window: int = 0
    yarn: float = 0
    experts: int = 0
    used: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    optional: str = ""

    def metadata(self) -> dict[str, Any]:
        """The GGUF metadata under the architecture's name, without that name."""
        values: dict[str, Any] = {
            "context_length": self.context,
            "embedding_length": self.hidden,
            "block_count": self.layers,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": self.rope_base,
        }
        if self.window:
            values["attention.sliding_window"] = self.window
        if self.experts:
            values |= {
                "expert_count": self.experts,
                "expert_used_count": self.used,
                "expert_feed_forward_length": self.ffn,
            }
        if self.yarn:
            values |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": self.yarn,
                "rope.scaling.original_context_length": int(self.context / self.yarn),
            }
        return {key: value for key, value in {**values, **self.more}.items() if value is not None}

    def first(self, count: int) -> Shape:
        """The model's first `count` layers, as a model."""
        more = dict(self.more)
        for key in _BY_LAYER:
            if isinstance(more.get(key), list):
                more[key] = more[key][:count]
        if "leading_dense_block_count" in more:
            more["leading_dense_block_count"] = min(count, more["leading_dense_block_count"])
        if "attention.shared_kv_layers" in more:  # the last ones
            more["attention.shared_kv_layers"] = max(0, count - self.layers + more["attention.shared_kv_layers"])
        return replace(self, layers=count, more=more)

    def has_optional(self, name: str) -> bool:
        """Whether the model has that tensor (full GGUF name), which its family's files may lack."""
        if name == "output.weight":
            return not self.tied
        if re.fullmatch(_SEPARATE, name) or re.fullmatch(self.optional, name):
            return True
        biases = _BIASES.get(self.architecture)
        return biases is not None and re.fullmatch(biases, name) is not None


# Metadata that may have a value for each layer.
_BY_LAYER = ("attention.sliding_window_pattern", "attention.head_count_kv", "feed_forward_length")
# Matrices that some families' files have in one with others: here they are apart.
_SEPARATE = r"blk\.\d+\.(ffn_gate_exps|ffn_up_exps|attn_qkv|attn_gate)\.weight"
# Pattern of the biases and the like that an architecture's models have and its files may lack, by full GGUF name.
_QKV_BIASES = r"blk\.\d+\.attn_[qkv]\.bias"
_BIASES = dict.fromkeys(("qwen2", "qwen2moe", "glm4moe"), _QKV_BIASES)
_BIASES |= {"gpt-oss": r"blk\..*\.bias", "starcoder2": r"blk\..*\.bias|output_norm\.bias"}
_BIASES["phimoe"] = r"blk\.\d+\.(attn_.*|ffn_norm)\.bias|output(_norm)?\.bias"
_MIXERS = r"blk\.\d+\.(ssm_conv1d\.bias|ssm_norm\.weight|exp_probs_b\.bias)"
_BIASES |= dict.fromkeys(("nemotron_h", "nemotron_h_moe", "granitehybrid", "falcon-h1", "lfm2moe"), _MIXERS)


def _delta_layers(value_heads: int, **more: Any) -> dict[str, Any]:
    """The metadata of Qwen 3.5's recurrent layers."""
    return {
        "full_attention_interval": 4,
        "ssm.group_count": 16,
        "ssm.time_step_rank": value_heads,
        "ssm.state_size": 128,
        "ssm.inner_size": 128 * value_heads,
        "ssm.conv_kernel": 4,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        **more,
    }


_GLM_AIR = {
    "rope.dimension_count": 64,
    "leading_dense_block_count": 1,
    "feed_forward_length": 10944,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def _deepseek(
    latent: tuple[int, int, int, int, int], multiplier: float, dense: tuple[int, int], **more: Any
) -> dict[str, Any]:
    """DeepSeek's metadata. latent: ranks of queries (0: none) and of keys and values, elements of a head that are not
    rotated, that are, and of a value. dense: how many layers are without experts, and their width."""
    query_rank, rank, still, rotary, value = latent
    return {
        "attention.q_lora_rank": query_rank,  # llama.cpp asks for it, though Lite's own files have none
        "attention.kv_lora_rank": rank,
        "attention.value_length": rank,
        "attention.key_length_mla": still + rotary,
        "attention.value_length_mla": value,
        "rope.dimension_count": rotary,
        "rope.scaling.yarn_log_multiplier": multiplier,
        "leading_dense_block_count": dense[0],
        "feed_forward_length": dense[1],
        **more,
    }


_DEEPSEEK_LITE = _deepseek((0, 512, 128, 64, 128), 0.0707, (1, 10944), expert_shared_count=2)
_DEEPSEEK_V3 = _deepseek(
    (1536, 512, 128, 64, 128),
    0.1,
    (3, 18432),
    expert_shared_count=1,
    expert_gating_func=2,
    expert_weights_scale=2.5,
    expert_weights_norm=True,
    expert_group_count=8,
    expert_group_used_count=4,
)


def _gemma4(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: tuple[int, int],
    ffn: int,
    window: int,
    more: Mapping[str, Any],
    experts: int = 0,
    used: int = 0,
) -> Shape:
    """A Gemma 4; kv_heads: of layers with a window, and of the sixth, which sees all."""
    windowed = [(index + 1) % 6 != 0 for index in range(layers)]
    small = "embedding_length_per_layer_input" in more
    values = {
        "attention.sliding_window_pattern": windowed,
        "attention.head_count_kv": [kv_heads[0] if own else kv_heads[1] for own in windowed],
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count_swa": 256,
        "final_logit_softcapping": 30.0,
        "embedding_length_per_layer_input": 0,
    }
    # Where a large model's layer sees all, keys are values, too.
    with_values = "|".join(str(index) for index, own in enumerate(windowed) if own or small)
    sizes = (layers, hidden, heads, kv_heads[1], 512, ffn, 262144, 131072 if small else 262144, 1e6)
    return Shape(
        "gemma4",
        *sizes,
        tied=True,
        window=window,
        more={**values, **more},
        optional=rf"blk\.({with_values})\.attn_v\.weight|blk\.\d+\.layer_output_scale\.weight|rope_freqs\.weight",
        experts=experts,
        used=used,
    )


def _nemotron_h(pattern: str, ssm: tuple[int, int, int, int], kv_heads: int, ffn: int) -> dict[str, Any]:
    """Nemotron-H's metadata. pattern: of each layer M (Mamba-2), * (attention) or - (a network), as the published
    configurations have it. ssm: heads, elements of each, groups, rows of a state."""
    heads, head_dim, groups, state = ssm
    return {
        "attention.head_count_kv": [kv_heads * (kind == "*") for kind in pattern],
        "feed_forward_length": [ffn * (kind == "-") for kind in pattern],
        "ssm.conv_kernel": 4,
        "ssm.inner_size": heads * head_dim,
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


_NEMOTRON_9B = _nemotron_h("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", (128, 80, 8, 128), 8, 15680)
_LFM2_8B = {
    "attention.head_count_kv": [8 * (index in (2, 6, 10, 14, 18, 21)) for index in range(24)],
    "shortconv.l_cache": 3,
    "feed_forward_length": 7168,
    "leading_dense_block_count": 2,
    "expert_gating_func": 2,
}
_GEMMA4_E4B = {"attention.shared_kv_layers": 18, "embedding_length_per_layer_input": 256}

SHAPES = {
    "tiny": Shape("qwen3", 2, 256, 4, 2, 64, 512, 256, 4096, 1e6),  # examples/tiny-qwen3.gguf
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, tied=True),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6),
    "qwen3-8b-yarn": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 131072, 1e6, yarn=4.0),
    "qwen3-32b": Shape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960, 1e6),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, 40960, 1e6, experts=128, used=8),
    "gpt-oss-20b": Shape(
        "gpt-oss", 24, 2880, 64, 8, 64, 2880, 201088, 131072, 1.5e5, window=128, yarn=32.0, experts=32, used=4
    ),
    "gemma3-270m": Shape("gemma3", 18, 640, 4, 1, 256, 2048, 262144, 32768, 1e6, tied=True, window=512),
    "qwen3.6-27b": Shape("qwen35", 64, 5120, 24, 4, 256, 17408, 248320, 262144, 1e7, more=_delta_layers(48)),
    "qwen3.6-35b-a3b": Shape(
        *("qwen35moe", 40, 2048, 16, 2, 256, 512, 248320, 262144, 1e7),
        experts=256,
        used=8,
        more=_delta_layers(32, expert_shared_feed_forward_length=512),
    ),
    "glm-4.5-air": Shape(
        "glm4moe", 46, 4096, 96, 8, 128, 1408, 151552, 131072, 1e6, experts=128, used=8, more=_GLM_AIR
    ),
    "deepseek-v2-lite": Shape(
        *("deepseek2", 27, 2048, 16, 1, 576, 1408, 102400, 163840, 1e4),
        yarn=40.0,
        experts=64,
        used=6,
        more=_DEEPSEEK_LITE,
    ),
    "deepseek-v3": Shape(
        *("deepseek2", 61, 7168, 128, 1, 576, 2048, 129280, 163840, 1e4),
        yarn=40.0,
        experts=256,
        used=8,
        more=_DEEPSEEK_V3,
        optional=r"blk\.\d+\.exp_probs_b\.bias",
    ),
    "gemma4-31b": _gemma4(60, 5376, 32, (16, 4), 21504, 1024, {}),
    "gemma4-26b-a4b": _gemma4(30, 2816, 16, (8, 2), 704, 1024, {"feed_forward_length": 2112}, experts=128, used=8),
    "gemma4-e4b": _gemma4(42, 2560, 8, (2, 2), 10240, 512, _GEMMA4_E4B),
    "nemotron-nano-9b-v2": Shape("nemotron_h", 56, 4480, 40, 8, 128, 15680, 131072, 131072, 1e4, more=_NEMOTRON_9B),
    "lfm2-8b-a1b": Shape(
        "lfm2moe", 24, 2048, 32, 8, 64, 1792, 65536, 128000, 1e6, tied=True, experts=32, used=4, more=_LFM2_8B
    ),
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5),
    "llama3-70b": Shape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, 5e5),
}

# Mixes of llama.cpp's, and single types: all matrices of one type.
RECIPES = ("Q4_K_M", "MXFP4_MOE", *sorted(t.name for t in SUPPORTED))
_UNQUANTISED = {"ffn_gate_inp": GGML.F32, "per_layer_model_proj": GGML.BF16}  # whatever the recipe
# Where a row is no multiple of a block, llama.cpp takes another type, of blocks of 32; for all not named here IQ4_NL.
_FALLBACKS = {GGML.Q4_K: GGML.Q5_0, GGML.Q5_K: GGML.Q5_1, GGML.Q6_K: GGML.Q8_0}


def recipe_types(recipe: str, shape: Shape) -> TypeOf:
    """What a recipe (of RECIPES) makes of a model of that shape."""

    def type_of(name: str, layer: int) -> GGML:
        if name in _UNQUANTISED:
            return _UNQUANTISED[name]
        if recipe == "Q4_K_M":
            return _q4_k_m(shape, name, layer)
        if recipe == "MXFP4_MOE":
            return GGML.MXFP4 if name.endswith("_exps") else GGML.Q8_0
        return GGML[recipe]

    return type_of


def _q4_k_m(shape: Shape, name: str, layer: int) -> GGML:
    """llama.cpp's mix (llama_tensor_get_type): the output and half of the layers' attn_v and ffn_down get more bits."""
    n = shape.layers
    if name == "output" or (name == "token_embd" and shape.tied):
        return GGML.Q6_K
    more_bits = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2  # llama.cpp's use_more_bits
    if name.removesuffix("_exps") in ("attn_v", "ffn_down") and more_bits:
        return GGML.Q6_K
    if name == "attn_qkv":
        return GGML.Q5_K
    if name == "attn_v" and (shape.architecture, n) == ("llama", 80):  # the 70B: eight heads share each row of v
        return GGML.Q5_K
    return GGML.Q4_K


def fitting_type(wanted: GGML, columns: int) -> GGML:
    """The type that llama.cpp gives to a matrix with rows of so many columns, where `wanted` is asked for; F16 where no
    block fits."""
    types = wanted, _FALLBACKS.get(wanted, GGML.IQ4_NL), GGML.F16
    return next(kind for kind in types if columns % GGML_QUANT_SIZES[kind][0] == 0)
