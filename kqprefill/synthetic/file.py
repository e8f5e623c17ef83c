"""A model of a Shape, with random weights, as a family sees a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..gguf import ModelTensor
from ..gguf.model_file import nbytes_of
from ..gguf.types import GGML
from ..gguf.vocabulary import byte_pieces
from ..models import describe_model
from .blocks import random_weights
from .shapes import RECIPES, SHAPES, Shape, TypeOf, fitting_type, recipe_types


@dataclass(frozen=True)
class SyntheticTensor(ModelTensor):
    """A tensor whose data are made when they are asked for, the same for a kind of tensor in every layer.

    whole: the tensor that this is a part of; None where it is whole itself.
    """

    whole: SyntheticTensor | None = None

    @property
    def data(self) -> NDArray[np.uint8]:
        """The quantised bytes, uint8 [..., row bytes]."""
        if self.whole is None:
            *_, name, last = self.name.split(".")
            return random_weights(self.shape, self.type, name if last in ("weight", "bias") else last)
        view = self.whole.data.reshape(-1)[self.offset : self.offset + self.nbytes]
        return view.reshape(*self.shape[:-1], nbytes_of(self.shape[-1:], self.type))

    def _part(self, name: str, shape: tuple[int, ...], index: int) -> SyntheticTensor:
        return replace(super()._part(name, shape, index), whole=self.whole or self)


class SyntheticFile:
    """A ModelFile that is no file: metadata and tensors are made of a Shape."""

    def __init__(self, shape: Shape, type_of: TypeOf, name: str) -> None:
        """type_of: gives each matrix's type; vectors, biases and convolutions are F32. name: instead of a path."""
        self.path = name
        self.metadata = _metadata(shape, name)
        self.tensors: dict[str, SyntheticTensor] = {}
        for declared, dims in describe_model(self.metadata, name, shape.vocab).tensor_shapes().items():
            full_name = declared.rstrip("?")
            if declared == full_name or shape.has_optional(full_name):
                kind = _type_of(full_name, dims, type_of)
                self.tensors[full_name] = SyntheticTensor(full_name, dims, kind)

    @classmethod
    def named(cls, name: str) -> SyntheticFile:
        """The model called "SHAPE:RECIPE", such as "qwen3-8b:Q4_K_M". Raises InputError for one that is not known."""
        shape_name, _, recipe = name.partition(":")
        recipe = recipe.upper() or "Q4_K_M"
        if shape_name not in SHAPES:
            raise InputError(f"{name}: no file, and there is no shape {_known(shape_name, SHAPES)}")
        if recipe not in RECIPES:
            raise InputError(f"{name}: {shape_name} is a shape, but there is no recipe {_known(recipe, RECIPES)}")
        shape = SHAPES[shape_name]
        return cls(shape, recipe_types(recipe, shape), f"{shape_name}:{recipe}")

    def close(self) -> None:
        """Forget the weights that were made, of every SyntheticFile."""
        random_weights.cache_clear()

    def __enter__(self) -> SyntheticFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _known(name: str, names: Iterable[str]) -> str:
    """A name that is not one of those, with the nearest of them, or all."""
    from difflib import get_close_matches

    near = get_close_matches(name, names, 3, 0.5)
    return f"{name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}")


# llama.cpp's tools open no vocabulary of this kind without merges and these ids. The merge changes no text's tokens:
# its parts never stand in one word, since letters and digits are split, and what it would make of them is no token.
_FOR_LLAMA_CPP: dict[str, Any] = {"merges": ["a 1"], "bos_token_id": 0, "eos_token_id": 0}


def _metadata(shape: Shape, name: str) -> dict[str, Any]:
    """All metadata of a file of that shape, by GGUF key."""
    metadata: dict[str, Any] = {"general.architecture": shape.architecture, "general.name": name}
    metadata |= {f"{shape.architecture}.{key}": value for key, value in shape.metadata().items()}
    if shape.vocab == 256:  # a token is a byte, written as GPT-2's vocabularies do
        tokens: dict[str, Any] = {
            "model": "gpt2",
            "pre": "default",
            "tokens": list(byte_pieces()),
            "token_type": [1] * 256,
        }
        tokens |= _FOR_LLAMA_CPP
    else:
        tokens = {"model": "none"}  # llama.cpp then asks for no vocabulary, and takes its size from here
        metadata[f"{shape.architecture}.vocab_size"] = shape.vocab
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    return metadata


def _type_of(full_name: str, dims: tuple[int, ...], type_of: TypeOf) -> GGML:
    """The type of a tensor, such as `blk.0.attn_q.weight`, of that shape."""
    *block, name, suffix = full_name.split(".")  # block: [] or ["blk", its number]
    if len(dims) == 1 or suffix == "bias" or name == "ssm_conv1d":
        return GGML.F32
    return fitting_type(type_of(name, int(block[1]) if block else 0), dims[-1])
