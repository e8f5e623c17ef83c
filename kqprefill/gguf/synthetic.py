"""Models of a known shape with random, valid quantised weights, for benchmarks: no file is needed, none is written.

Weights are drawn from a pool of real blocks (Gaussian, sigma 0.02, quantised by ggml: block_pool.npz); all-zero or
constant weights would run faster than real ones do.
"""

from dataclasses import dataclass
from functools import cache
import mmap
from pathlib import Path

import numpy as np

from ..errors import InputError
from .dequantize import SUPPORTED
from .types import GGML, GGML_QUANT_SIZES
from .vocabulary import byte_pieces


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
    window: int = 0
    yarn: float = 0  # what YaRN stretches the context by, to `context`
    experts: int = 0  # of a layer; ffn is then the width of each
    used: int = 0  # by a token


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
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5),
    "llama3-70b": Shape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, 5e5),
}
RECIPES = ("Q4_K_M", "MXFP4_MOE", *sorted(t.name for t in SUPPORTED))
# Where a row is no multiple of a block, llama.cpp takes another type, of blocks of 32; for all not named here IQ4_NL.
_FALLBACKS = {GGML.Q4_K: GGML.Q5_0, GGML.Q5_K: GGML.Q5_1, GGML.Q6_K: GGML.Q8_0}


def _q4_k_m(shape, name, layer):
    """llama.cpp's mix (llama_tensor_get_type): half of attn_v and ffn_down, and the output, get more bits."""
    n = shape.layers
    if name == "output" or (name == "token_embd" and shape.tied):
        return GGML.Q6_K
    if name == "ffn_gate_inp":  # the router
        return GGML.F32
    if name.removesuffix("_exps") in ("attn_v", "ffn_down") and (
        layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    ):
        return GGML.Q6_K
    if name == "attn_v" and (shape.architecture, n) == ("llama", 80):  # the 70B: eight heads share each row of v
        return GGML.Q5_K
    return GGML.Q4_K


@dataclass(frozen=True)
class SyntheticTensor:
    """Looks like `reader.Tensor`; its data are made when asked for, the same for a kind of tensor in every layer."""

    name: str
    shape: tuple[int, ...]
    type: GGML

    @property
    def nbytes(self):
        block_elements, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block_elements * block_bytes

    @property
    def data(self):
        return _random_weights(self.shape, self.type, self.name.split(".")[-2])

    def item(self, index):
        """As `reader.Tensor.item`."""
        return _Item(self.data[index], self.shape[1:], self.type, f"{self.name}[{index}]")


@dataclass(frozen=True)
class _Item:
    """One of a stack of matrices."""

    data: np.ndarray
    shape: tuple[int, ...]
    type: GGML
    name: str

    @property
    def nbytes(self):
        return self.data.nbytes


class SyntheticFile:
    """Looks like `GGUFFile`: the metadata and tensors of a Shape; type_of(tensor name, layer) gives each matrix's type."""

    def __init__(self, shape, type_of, name):
        s, self.path = shape, name
        values = {
            "context_length": s.context,
            "embedding_length": s.hidden,
            "block_count": s.layers,
            "feed_forward_length": s.ffn,
            "attention.head_count": s.heads,
            "attention.head_count_kv": s.kv_heads,
            "attention.key_length": s.head_dim,
            "attention.value_length": s.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": s.rope_base,
        }
        if s.window:
            values["attention.sliding_window"] = s.window
        if s.experts:
            values |= {"expert_count": s.experts, "expert_used_count": s.used, "expert_feed_forward_length": s.ffn}
        if s.yarn:
            values |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": s.yarn,
                "rope.scaling.original_context_length": int(s.context / s.yarn),
            }
        self.metadata = {"general.architecture": s.architecture, "general.name": self.path}
        self.metadata.update({f"{s.architecture}.{key}": value for key, value in values.items()})
        if s.vocab == 256:  # a token is a byte, written as GPT-2's vocabularies do
            tokens = {"model": "gpt2", "pre": "default", "tokens": list(byte_pieces()), "token_type": [1] * 256}
        else:
            tokens = {"model": "none"}  # llama.cpp then asks for no vocabulary, and takes its size from here
            self.metadata[f"{s.architecture}.vocab_size"] = s.vocab
        self.metadata.update({f"tokenizer.ggml.{key}": value for key, value in tokens.items()})
        self.tensors = {}

        def add(prefix, name, *dims, layer=0, part="weight"):
            full = f"{prefix}{name}.{part}"
            kind = GGML.F32 if len(dims) == 1 or part == "bias" else type_of(name, layer)
            if dims[-1] % GGML_QUANT_SIZES[kind][0]:
                kind = _FALLBACKS.get(kind, GGML.IQ4_NL)
            self.tensors[full] = SyntheticTensor(full, dims, kind)

        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        add("", "token_embd", s.vocab, s.hidden)
        add("", "output_norm", s.hidden)
        if not s.tied:
            add("", "output", s.vocab, s.hidden)
        for i in range(s.layers):
            dims = {
                "attn_norm": (s.hidden,),
                "attn_q": (q, s.hidden),
                "attn_k": (kv, s.hidden),
                "attn_v": (kv, s.hidden),
                "attn_output": (s.hidden, q),
                "ffn_norm": (s.hidden,),
                "ffn_gate": (s.ffn, s.hidden),
                "ffn_up": (s.ffn, s.hidden),
                "ffn_down": (s.hidden, s.ffn),
            }
            if s.experts:
                stacks = {f"{name}_exps": (s.experts, *dims.pop(name)) for name in ("ffn_gate", "ffn_up", "ffn_down")}
                dims |= {"ffn_gate_inp": (s.experts, s.hidden), **stacks}
            if s.architecture in ("qwen3", "qwen3moe", "gemma3"):
                dims |= {"attn_q_norm": (s.head_dim,), "attn_k_norm": (s.head_dim,)}
            if s.architecture == "gemma3":
                dims |= {"post_attention_norm": (s.hidden,), "post_ffw_norm": (s.hidden,)}
            if s.architecture == "gpt-oss":
                dims["post_attention_norm"] = dims.pop("ffn_norm")
                dims["attn_sinks"] = (s.heads,)
            for name, shape in dims.items():
                add(f"blk.{i}.", name, *shape, layer=i)
                if (
                    name in ("attn_q", "attn_k", "attn_v")
                    and s.architecture == "qwen2"
                    or len(shape) > 1
                    and s.architecture == "gpt-oss"
                ):
                    add(f"blk.{i}.", name, *shape[:-1], part="bias")

    @classmethod
    def named(cls, name):
        """The model called "SHAPE:RECIPE", such as "qwen3-8b:Q4_K_M". Raises InputError for one that is not known."""
        shape_name, _, recipe = name.partition(":")
        recipe = recipe.upper() or "Q4_K_M"
        if shape_name not in SHAPES or recipe not in RECIPES:
            raise InputError(
                f"{name}: neither a file nor SHAPE:RECIPE; shapes are {', '.join(SHAPES)}; recipes {', '.join(RECIPES)}"
            )
        shape = SHAPES[shape_name]

        def type_of(tensor, layer):
            if recipe == "Q4_K_M":
                return _q4_k_m(shape, tensor, layer)
            if tensor == "ffn_gate_inp":
                return GGML.F32
            if recipe == "MXFP4_MOE":
                return GGML.MXFP4 if tensor.endswith("_exps") else GGML.Q8_0
            return GGML[recipe]

        return cls(shape, type_of, f"{shape_name}:{recipe}")

    def close(self):
        _random_weights.cache_clear()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@cache
def _random_weights(shape, kind, name):
    """uint8 [..., row bytes]: blocks drawn from the pool; a norm's weights are spread about 1."""
    rng = np.random.default_rng([*shape, int(kind), *name.encode()])
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if len(shape) == 1:  # a norm
        return (1 + 0.1 * rng.standard_normal(shape, np.float32)).astype(np.float32).view(np.uint8)
    row_bytes = shape[-1] // block_elements * block_bytes
    blocks = pool(kind)
    index = rng.integers(0, len(blocks), int(np.prod(shape)) // block_elements, dtype=np.uint32)
    # Memory of its own pages, as a mapped file's, which a backend may lock.
    out = np.frombuffer(mmap.mmap(-1, int(np.prod(shape[:-1])) * row_bytes), np.uint8)
    np.take(blocks, index, axis=0, out=out.reshape(-1, blocks.shape[1]))
    return out.reshape(*shape[:-1], row_bytes)


@cache
def pool(kind):
    """uint8 [n, block bytes]: valid blocks of Gaussian weights of any supported type."""
    with np.load(Path(__file__).with_name("block_pool.npz")) as stored:
        if kind.name in stored:
            return stored[kind.name]
    if GGML_QUANT_SIZES[kind][0] > 1 and kind != GGML.Q8_K:
        return _random_blocks(kind, 8192)
    weights = 0.02 * np.random.default_rng(0).standard_normal((8192, 256)).astype(np.float32)
    if kind == GGML.Q8_K:  # d, 256 int8, 16 sums of 16
        d = np.abs(weights).max(axis=1, keepdims=True) / 127
        q = np.rint(weights / d).astype(np.int8)
        sums = q.reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
        return np.concatenate([d.view(np.uint8), q.view(np.uint8), sums.view(np.uint8)], axis=1)
    if kind == GGML.BF16:
        return (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1, 1).view(np.uint8)
    return weights.astype(np.float16 if kind == GGML.F16 else np.float32).reshape(-1, 1).view(np.uint8)


def _random_blocks(kind, n):
    """uint8 [n, block bytes]: blocks of a type that nobody here can quantise to: random bits, and scales such that weights are
    of the size of the other types'."""
    rng, block_bytes = np.random.default_rng(int(kind)), GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    spread = {"Q1_0": 0.02, "TQ1_0": 0.02, "TQ2_0": 0.02, "IQ1_S": 3e-3, "IQ1_M": 3e-3, "IQ3_S": 1.5e-4}  # else 3e-4
    d = (spread.get(kind.name, 3e-4) * rng.uniform(0.7, 1.4, n)).astype(np.float16).view(np.uint16)
    if kind.name == "MXFP4":
        raw[:, 0] = rng.integers(117, 121, n)  # powers of two
    elif kind.name == "NVFP4":
        raw[:, :4] = rng.integers(1, 0x28, (n, 4))  # floats of 3 bits
    elif kind.name == "IQ1_M":  # four bits at the top of each of four words
        words = raw[:, 48:].copy().view(np.uint16)
        nibbles = d[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        raw[:, 48:] = (words & 0x0FFF | nibbles << 12).astype(np.uint16).view(np.uint8)
    else:
        at = block_bytes - 2 if kind.name.startswith("TQ") else 0
        raw[:, at : at + 2] = d[:, None].view(np.uint8)
    return raw


def write_gguf(model, path):
    """Write a SyntheticFile to `path` as GGUF v3, tensor by tensor. Raises OSError."""
    from gguf import GGUFWriter

    architecture = model.metadata["general.architecture"]
    writer = GGUFWriter(None, architecture)
    for key, value in model.metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for tensor in model.tensors.values():
        writer.add_tensor_info(tensor.name, tensor.data.shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for tensor in model.tensors.values():
        file.write(b"\0" * (-file.tell() % writer.data_alignment))
        file.write(tensor.data.data)
    file.write(b"\0" * (-file.tell() % writer.data_alignment))
    writer.close()
