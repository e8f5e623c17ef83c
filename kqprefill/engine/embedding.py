"""Vectors of many texts: what is pooled, and batches of them without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias, cast, get_args

import numpy as np

from ..backends.base import Backend
from ..core import Batch, Float32Array, PendingHead, Pooling, Progress, Segment, Vectors
from ..errors import InputError
from ..gguf import dequantize
from ..models.family import Family
from .packing import packs
from .scoring import Group, Item

# What is done to a vector at last: it is divided by its Euclidean length, or handed on as it is.
Normalise: TypeAlias = Literal["l2", "none"]

POOLINGS: tuple[str, ...] = get_args(Pooling)
NORMALISATIONS: tuple[str, ...] = get_args(Normalise)
_BY_NUMBER: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last", 4: "last"}  # llama.cpp's enum llama_pooling_type


def pooling_of(family: Family, wanted: str | None) -> Pooling:
    """The pooling that the caller wants, or else the model's file says (`pooling_type`).

    Raises InputError where neither does, or it is no pooling.
    """
    if wanted is None:
        number = family.meta.count("pooling_type")
        if number not in _BY_NUMBER:
            raise InputError(
                f"{family.file.path}: the file does not say how its outputs are pooled; give a pooling, "
                f"one of {', '.join(POOLINGS)}"
            )
        return _BY_NUMBER[number]
    if wanted not in POOLINGS:
        raise InputError(f"pooling {wanted!r} is unknown; choose one of {', '.join(POOLINGS)}")
    return cast(Pooling, wanted)


def closing_token(family: Family) -> int | None:
    """The token that a text must end with though the file does not say so; None for none.

    Models that pool the last position were trained with their end token there; their first files do not ask for it
    (llama.cpp#14234).
    """
    metadata = family.file.metadata
    if family.meta.count("pooling_type") != 3 or "tokenizer.ggml.add_eos_token" in metadata:
        return None
    end = metadata.get("tokenizer.ggml.eos_token_id")
    return int(end) if isinstance(end, (int, np.integer)) and 0 <= end < family.config.vocab_size else None


def _packed(prompts: Sequence[list[int]], pooling: Pooling) -> Batch:
    """Whole prompts as one batch."""
    ends = np.cumsum([len(ids) for ids in prompts])
    segments = tuple(Segment(int(end) - len(ids), len(ids)) for ids, end in zip(prompts, ends))
    return Batch(np.concatenate([np.array(ids, np.int32) for ids in prompts]), segments=segments, pooling=pooling)


def vectors(
    backend: Backend,
    family: Family,
    prompts: Iterable[list[int] | None],
    pooling: Pooling,
    normalise: Normalise,
    batch_tokens: int | None,
    progress: Progress,
) -> Iterator[Float32Array]:
    """What `Model.embed` gives, of prompts' ids: each batch is started before the one before is waited for."""
    size = backend.batch_size(family, batch_tokens, 0, progress)
    projections = [dequantize(weight.tensor.data, weight.tensor.type) for weight in family.projections()]

    @np.errstate(all="ignore")
    def start(group: Group) -> PendingHead:
        batch = _packed([item.prompt for item, _ in group], pooling)
        return backend.run(family, batch, None, "pooled", progress)[0]

    groups = packs((None if ids is None else Item(ids) for ids in prompts), size.tokens, size.first)
    started = (None if group is None else start(group) for group in groups)
    for pending in backend.in_turn(started):
        for vector in cast(Vectors, pending()).values:
            for matrix in projections:
                vector = matrix @ vector
            yield normalised(vector) if normalise == "l2" else vector


def normalised(vector: Float32Array) -> Float32Array:
    """A vector divided by its Euclidean length, summed in float64; zeros stay zeros."""
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    return vector if length == 0 else (vector / length).astype(np.float32)
