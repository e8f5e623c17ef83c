"""Models of a known shape with random, valid quantised weights, for benchmarks: no file is needed, none is written.

Weights are drawn from a pool of real blocks (Gaussian, sigma 0.02, quantised by ggml: block_pool.npz); all-zero or
constant weights would run faster than real ones do.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as GGML

from ..errors import InputError
from .dequantize import SUPPORTED


@dataclass(frozen=True)
class Shape:
    """A model's published sizes."""

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


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, tied=True),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6),
    "qwen3-32b": Shape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960, 1e6),
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5),
    "llama3-70b": Shape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, 5e5),
}
RECIPES = ("Q4_K_M", *sorted(t.name for t in SUPPORTED))


def _q4_k_m(shape, name, layer):
    """llama.cpp's mix (llama_tensor_get_type): half of attn_v and ffn_down, and the output, get more bits."""
    n = shape.layers
    if name == "output" or (name == "token_embd" and shape.tied):
        return GGML.Q6_K
    if name in ("attn_v", "ffn_down") and (layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2):
        return GGML.Q6_K
    if name == "attn_v" and (shape.architecture, n) == ("llama", 80):  # the 70B: eight heads share each row of v
        return GGML.Q5_K
    return GGML.Q4_K


@dataclass(frozen=True)
class SyntheticTensor:
    """Looks like `reader.Tensor`; its data are made when asked for, the same for equal shapes and types."""

    name: str
    shape: tuple[int, ...]
    type: GGML
    offset: int = field(default=0, init=False)

    @property
    def nbytes(self):
        block_elements, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block_elements * block_bytes

    @property
    def data(self):
        return _random_weights(self.shape, self.type)


class SyntheticFile:
    """Looks like `GGUFFile`: the metadata and tensors of "SHAPE:RECIPE", such as "qwen3-8b:Q4_K_M".

    Raises InputError for a shape or recipe that is not known.
    """

    def __init__(self, name):
        shape_name, _, recipe = name.partition(":")
        recipe = recipe or "Q4_K_M"
        if shape_name not in SHAPES or recipe.upper() not in RECIPES:
            raise InputError(
                f"{name}: neither a file nor SHAPE:RECIPE; shapes are {', '.join(SHAPES)}; recipes {', '.join(RECIPES)}"
            )
        s = SHAPES[shape_name]
        self.path = f"{shape_name}:{recipe.upper()}"
        values = {
            "context_length": s.context, "embedding_length": s.hidden, "block_count": s.layers,
            "feed_forward_length": s.ffn, "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads,
            "attention.key_length": s.head_dim, "attention.value_length": s.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": s.rope_base,
        }  # fmt: skip
        self.metadata = {"general.architecture": s.architecture, "general.name": self.path}
        self.metadata.update({f"{s.architecture}.{key}": value for key, value in values.items()})
        self.tensors = {}

        def add(prefix, name, *dims, layer=0):
            if len(dims) == 1:
                kind = GGML.F32
            else:
                kind = _q4_k_m(s, name, layer) if recipe.upper() == "Q4_K_M" else GGML[recipe.upper()]
            full = f"{prefix}{name}.weight"
            self.tensors[full] = SyntheticTensor(full, dims, kind)

        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        add("", "token_embd", s.vocab, s.hidden)
        add("", "output_norm", s.hidden)
        if not s.tied:
            add("", "output", s.vocab, s.hidden)
        for i in range(s.layers):
            dims = {
                "attn_norm": (s.hidden,), "attn_q": (q, s.hidden), "attn_k": (kv, s.hidden), "attn_v": (kv, s.hidden),
                "attn_output": (s.hidden, q), "ffn_norm": (s.hidden,), "ffn_gate": (s.ffn, s.hidden),
                "ffn_up": (s.ffn, s.hidden), "ffn_down": (s.hidden, s.ffn),
            }  # fmt: skip
            if s.architecture == "qwen3":
                dims |= {"attn_q_norm": (s.head_dim,), "attn_k_norm": (s.head_dim,)}
            for name, shape in dims.items():
                add(f"blk.{i}.", name, *shape, layer=i)

    def close(self):
        _random_weights.cache_clear()


@cache
def _random_weights(shape, kind):
    """uint8 [..., row bytes]: blocks drawn from the pool, or fresh Gaussian numbers for unquantised types."""
    rng = np.random.default_rng([*shape, int(kind)])
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if len(shape) == 1:  # a norm
        return (1 + 0.1 * rng.standard_normal(shape, np.float32)).view(np.uint8)
    row_bytes = shape[-1] // block_elements * block_bytes
    blocks = pool(kind)
    index = rng.integers(0, len(blocks), int(np.prod(shape)) // block_elements, dtype=np.uint32)
    return blocks[index].reshape(*shape[:-1], row_bytes)


@cache
def pool(kind):
    """uint8 [n, block bytes]: valid blocks of Gaussian weights of any supported type."""
    with np.load(Path(__file__).with_name("block_pool.npz")) as stored:
        if kind.name in stored:
            return stored[kind.name]
    weights = 0.02 * np.random.default_rng(0).standard_normal((8192, 256)).astype(np.float32)
    if kind == GGML.Q8_K:  # d, 256 int8, 16 sums of 16
        d = np.abs(weights).max(axis=1, keepdims=True) / 127
        q = np.rint(weights / d).astype(np.int8)
        sums = q.reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
        return np.concatenate([d.view(np.uint8), q.view(np.uint8), sums.view(np.uint8)], axis=1)
    if kind == GGML.BF16:
        return (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1, 1).view(np.uint8)
    return weights.astype(np.float16 if kind == GGML.F16 else np.float32).reshape(-1, 1).view(np.uint8)
