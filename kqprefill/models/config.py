"""A model's hyper-parameters, read from GGUF metadata and held against one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array
from ..errors import ModelError
from ..gguf.keys import described

Float64Array: TypeAlias = NDArray[np.float64]

SMALLEST, LARGEST = 2.0**-126, 2.0**127  # of what a file may give as a positive number: its reciprocal is one, too


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the frequencies, and which elements of a head turn together.

    inv_freq: float64 [width/2], radians per position, scaling (linear, YaRN, rope_freqs) already in it.
    magnitude: what cos and sin are multiplied by (YaRN's attention temperature; 1 otherwise).
    interleaved: pairs are (2i, 2i+1), as in ggml's GGML_ROPE_TYPE_NORMAL; else (i, i + width/2), its NEOX type.
    beta, beta_length, beta_offset: queries at position p are multiplied by `temperature(p)` (Llama 4's and Mistral
    3's). There may be no frequencies, but a temperature.
    """

    inv_freq: Float64Array
    magnitude: float = 1.0
    interleaved: bool = False
    beta: float = 0.0
    beta_length: int = 1
    beta_offset: int = 0

    def temperature(self, positions: NDArray[np.integer[Any]]) -> Float64Array:
        """1 + beta ln(1 + floor((position + beta_offset) / beta_length)) (llama.cpp: llm_graph_input_attn_temp),
        float64."""
        periods = np.floor_divide(positions + self.beta_offset, self.beta_length)
        temperature: Float64Array = 1 + self.beta * np.log1p(periods)
        return temperature

    @property
    def width(self) -> int:
        """Elements of each head that are rotated; those after them pass through."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a decoder-only transformer, named as GGUF names them.

    block_count: the layers that are computed. nextn_predict_layers: blocks after them that predict further tokens,
    which GGUF counts among its blocks. layer_norm: whether norms subtract the mean (LayerNorm, arXiv 1607.06450)
    before they divide (RMSNorm). norm_epsilon: what they add to the mean square.
    """

    architecture: str
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    norm_epsilon: float
    vocab_size: int
    nextn_predict_layers: int = 0
    layer_norm: bool = False

    @property
    def q_width(self) -> int:
        """Values of one token's queries."""
        return self.head_count * self.head_dim

    @property
    def kv_width(self) -> int:
        """Values of one token's keys; its values are as many."""
        return self.head_count_kv * self.head_dim

    @classmethod
    def from_gguf(
        cls, meta: ArchMetadata, vocab_size: int, *, head_dim: int | None = None, layer_norm: bool = False
    ) -> Config:
        """vocab_size: rows of token_embd.weight. head_dim: where a family's files do not say it in attention.key_length
        and value_length. layer_norm: which norm the family has. Raises ModelError for impossible values."""
        embedding = meta.integer("embedding_length")
        heads = meta.integer("attention.head_count")
        kv_heads = meta.integer("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise meta.error(f"attention.head_count {heads} is not a multiple of head_count_kv {kv_heads}")
        if meta.integer("vocab_size", vocab_size) != vocab_size:
            raise meta.error(
                f"vocab_size is {meta.integer('vocab_size')}, but token_embd.weight has {vocab_size} rows; "
                "convert the model again"
            )
        if head_dim is None:
            head_dim = meta.integer("attention.key_length", embedding // heads or 1)
            if meta.integer("attention.value_length", head_dim) != head_dim:
                raise meta.error("attention.value_length differs from attention.key_length, which is not supported")
        if head_dim % 2:
            raise meta.error(f"attention.key_length {head_dim} is odd; rotary embedding needs pairs")
        blocks, nextn = meta.integer("block_count"), meta.count("nextn_predict_layers")
        if nextn >= blocks:
            raise meta.error(f"nextn_predict_layers {nextn} leaves nothing of block_count {blocks}")
        return cls(
            architecture=meta.architecture,
            block_count=blocks - nextn,
            context_length=meta.integer("context_length"),
            embedding_length=embedding,
            feed_forward_length=meta.integer("feed_forward_length", meta.integer_or_none("expert_feed_forward_length")),
            head_count=heads,
            head_count_kv=kv_heads,
            head_dim=head_dim,
            norm_epsilon=meta.number(f"attention.layer_norm{'' if layer_norm else '_rms'}_epsilon"),
            vocab_size=vocab_size,
            nextn_predict_layers=nextn,
            layer_norm=layer_norm,
        )


class ArchMetadata:
    """The metadata under `<architecture>.`. Whoever reads a value that is missing or impossible gets a ModelError."""

    def __init__(self, metadata: Mapping[str, Any], path: str, architecture: str) -> None:
        """metadata: all that the file has. path: the file's, for messages."""
        self._metadata, self._path, self.architecture = metadata, path, architecture

    def error(self, what: str) -> ModelError:
        """The exception, to be raised, for a file with that fault."""
        return ModelError(f"{self._path}: {self.architecture}: {what}")

    def has(self, key: str) -> bool:
        """Whether the file says anything under that key."""
        return f"{self.architecture}.{key}" in self._metadata

    def _get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.error(f"metadata {self.architecture}.{key} is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer below 2^31 (an array of equal ones, as some converters write, counts as one)."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(f"metadata {key} is {described(value)}, not a positive integer")
        return value

    def count(self, key: str) -> int:
        """An integer from 0 to 2^31 - 1; 0 where the file does not say."""
        value = self._get(key, 0)
        return 0 if type(value) is int and value == 0 else self.integer(key)

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self._get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(f"metadata {key} is {value!r}, not true or false")
        return bool(value)

    def flags(self, key: str, at_least: int) -> list[bool]:
        """An array of bools, of so many layers at least."""
        value = self._get(key, None)
        listed = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(listed, list) or len(listed) < at_least or not all(isinstance(v, bool) for v in listed):
            raise self.error(f"metadata {key} is not an array of at least {at_least} bools")
        return listed

    def integers(self, key: str, length: int) -> list[int]:
        """An array of so many integers, none negative."""
        value = np.asarray(self._get(key, None))
        if value.dtype.kind not in "iu" or value.shape != (length,) or (value < 0).any():
            raise self.error(f"metadata {key} is not an array of {length} integers from 0 on")
        return [int(number) for number in value]

    def of_layers(self, key: str, layers: int, default: int | None = None, least: int = 1) -> list[int]:
        """An integer for each layer, `least` (1 or 0) or more: an array of so many at least, or one for all."""
        value = self._get(key, default)
        value = np.asarray(value) if isinstance(value, list) else value
        if not isinstance(value, np.ndarray):
            return [self.integer(key, default) if least else self.count(key)] * layers
        if value.dtype.kind not in "iu" or len(value) < layers or not ((value >= least) & (value < 1 << 31)).all():
            raise self.error(f"metadata {key} is {described(value)}, not an integer or an array of {layers}")
        return [int(number) for number in value[:layers]]

    def numbers(self, key: str, at_least: int) -> list[float]:
        """An array of numbers, of so many layers at least; any of them may be infinite, none NaN."""
        value = np.asarray(self._get(key, None))
        if value.dtype.kind not in "iuf" or value.ndim != 1 or len(value) < at_least or np.isnan(value).any():
            raise self.error(f"metadata {key} is {described(value)}, not an array of at least {at_least} numbers")
        return [float(number) for number in value[:at_least]]

    def replaced(self, key: str, value: Any) -> ArchMetadata:
        """The same metadata but for one value."""
        return ArchMetadata({**self._metadata, f"{self.architecture}.{key}": value}, self._path, self.architecture)

    def with_largest(self, *keys: str) -> ArchMetadata:
        """The same metadata, where of those keys' arrays of integers only the largest is left, or 1 of zeros."""
        meta = self
        for key in keys:
            value = self._metadata.get(f"{self.architecture}.{key}")
            value = np.asarray(value) if isinstance(value, list) else value
            if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
                meta = meta.replaced(key, max(1, int(value.max())))
        return meta

    def integer_or_none(self, key: str) -> int | None:
        """`integer`, or None where the file does not say."""
        return self.integer(key) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of float32's range."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not SMALLEST <= value <= LARGEST:
            raise self.error(f"metadata {key} is {described(value)}, not a positive number of float32's range")
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(f"metadata {key} is {described(value)}, not a text")
        return value


def read_rope(
    meta: ArchMetadata,
    head_dim: int,
    *,
    interleaved: bool,
    base: float | None = None,
    scaled: bool = True,
    factors: Float32Array | None = None,
) -> Rope:
    """The rotary embedding that the metadata describes.

    base: instead of rope.freq_base. scaled=False: without rope.scaling (Gemma 3's local layers). factors: float32
    [width/2], which divide the frequencies (rope_freqs.weight: Llama 3.1's scaling). Scaling types are llama.cpp's:
    none, linear, yarn (arXiv 2309.00071, as in ggml's rope_yarn). Raises ModelError.
    """
    width = meta.integer("rope.dimension_count", head_dim)
    if width > head_dim or width % 2:
        raise meta.error(f"rope.dimension_count {width} does not fit heads of {head_dim}")
    if base is None:
        base = meta.number("rope.freq_base", 10000.0)
    if factors is not None and not (factors > 0).all():
        raise meta.error("rope_freqs.weight must hold positive factors")
    with np.errstate(all="ignore"):
        inv_freq = base ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        if factors is not None:
            inv_freq = inv_freq / factors
        magnitude = 1.0
        if scaled:
            inv_freq, magnitude = _scaled(meta, inv_freq, width, base)
    if not ((np.abs(inv_freq) <= LARGEST).all() and 0 < magnitude <= LARGEST):
        raise meta.error("rope.freq_base, rope.scaling and rope_freqs.weight contradict: a rotation is not finite")
    return Rope(inv_freq, magnitude, interleaved)


def _scaled(meta: ArchMetadata, inv_freq: Float64Array, width: int, base: float) -> tuple[Float64Array, float]:
    """The frequencies under rope.scaling, and what cos and sin are multiplied by."""
    kind = meta.string("rope.scaling.type", "none")
    if kind == "none":
        return inv_freq, 1.0
    factor = meta.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "yarn":
        ramp = _yarn_ramp(meta, width, base)
        magnitude = meta.number("rope.scaling.attn_factor", 1.0) * (1.0 + 0.1 * math.log(factor))
        # DeepSeek's mscale_all_dim gives a temperature that divides cos and sin, and so q and k.
        if meta.has("rope.scaling.yarn_log_multiplier"):
            temperature = 1.0 + 0.1 * meta.number("rope.scaling.yarn_log_multiplier") * math.log(factor)
            magnitude = magnitude / temperature if temperature else math.inf
        return inv_freq / factor * (1 - ramp) + inv_freq * ramp, magnitude
    raise meta.error(f"rope.scaling.type {kind!r} is not supported (none, linear and yarn are)")


def _yarn_ramp(meta: ArchMetadata, width: int, base: float) -> Float64Array:
    """How far each pair keeps its own frequency: 1 for fast pairs, 0 for slow ones; float64 [width/2]."""
    original = meta.integer("rope.scaling.original_context_length", meta.integer("context_length"))

    def pair_that_turns(rotations: float) -> float:
        """Which pair turns so many times over the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    try:
        low = max(0, math.floor(pair_that_turns(meta.number("rope.scaling.yarn_beta_fast", 32.0))))
        high = min(width - 1, math.ceil(pair_that_turns(meta.number("rope.scaling.yarn_beta_slow", 1.0))))
    except (ArithmeticError, ValueError):
        raise meta.error("rope.freq_base and rope.scaling's betas are out of range for YaRN") from None
    low, high = min(low, width), max(high, -1)  # beyond, nothing depends on how far
    return 1 - np.clip((np.arange(width // 2) - low) / max(0.001, high - low), 0, 1)
