"""A model of a Shape, with random weights, as a family sees a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
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
from ..models.weights import BY_ROW
from .blocks import forget_weights, random_weights
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
            return random_weights(*self.drawn_by)
        view = self.whole.data.reshape(-1)[self.offset : self.offset + self.nbytes]
        return view.reshape(*self.shape[:-1], nbytes_of(self.shape[-1:], self.type))

    @property
    def drawn_by(self) -> tuple[tuple[int, ...], GGML, str]:
        """What a whole tensor's data are made of: tensors of which this is equal share them."""
        *_, name, last = self.name.split(".")
        return self.shape, self.type, name if last in ("weight", "bias") else last

    def _part(self, name: str, shape: tuple[int, ...], index: int) -> SyntheticTensor:
        return replace(super()._part(name, shape, index), whole=self.whole or self)


class SyntheticFile:
    """A ModelFile that is no file: metadata and tensors are made of a Shape.

    whole: the model whose first layers these are; None where all of its layers are here. block_count: how many are.
    """

    whole: SyntheticFile | None = None

    def __init__(self, shape: Shape, type_of: TypeOf, name: str) -> None:
        """type_of: gives each matrix's type; vectors, biases and convolutions are F32. name: instead of a path."""
        self.path = name
        self.metadata = _metadata(shape, name)
        self.block_count = shape.layers
        self.tensors: dict[str, SyntheticTensor] = {}
        for declared, dims in describe_model(self.metadata, name, shape.vocab).tensor_shapes().items():
            full_name = declared.rstrip("?")
            if declared == full_name or shape.has_optional(full_name):
                kind = _type_of(full_name, dims, type_of)
                self.tensors[full_name] = SyntheticTensor(full_name, dims, kind)

    @classmethod
    def named(cls, name: str, layers: int | None = None) -> SyntheticFile:
        """The model called "SHAPE:RECIPE", such as "qwen3-8b:Q4_K_M"; or its first `layers` layers, with the types that
        they have in the whole model. Raises InputError for one that is not known, or has no more layers than that."""
        shape_name, _, recipe = name.partition(":")
        recipe = recipe.upper() or "Q4_K_M"
        if shape_name not in SHAPES:
            raise InputError(f"{name}: no file, and there is no shape {_known(shape_name, SHAPES)}")
        if recipe not in RECIPES:
            raise InputError(f"{name}: {shape_name} is a shape, but there is no recipe {_known(recipe, RECIPES)}")
        shape = SHAPES[shape_name]
        types, name = recipe_types(recipe, shape), f"{shape_name}:{recipe}"
        whole = cls(shape, types, name)
        if layers is None or layers == shape.layers:
            return whole
        if not 0 < layers < shape.layers:
            raise InputError(f"{name}: --layers {layers}: it has {shape.layers} layers")
        part = cls(shape.first(layers), types, f"{name} ({layers} of {shape.layers} layers)")
        part.whole = whole
        return part

    def shares(self) -> tuple[float, float] | None:
        """What share of the whole model's layers these are, by the bytes of their weights and by number; 1 for all.

        None where a kind of layer (tensors and their shapes) is missing here, of which nothing is known then.
        """
        if self.whole is None:
            return 1.0, 1.0
        here, there = _layers(self.tensors), _layers(self.whole.tensors)
        kinds = [{frozenset((name, t.shape) for name, t in layer.items()) for layer in some} for some in (here, there)]
        if kinds[0] != kinds[1]:
            return None
        nbytes = [sum(t.nbytes for layer in some for t in layer.values()) for some in (here, there)]
        return nbytes[0] / nbytes[1], self.block_count / self.whole.block_count

    def memory(self) -> int:
        """Bytes of main memory that the weights take once all are made; tensors of a kind share theirs."""
        return sum({tensor.drawn_by: tensor.nbytes for tensor in self.tensors.values()}.values())

    def most_layers(self, size: Callable[[SyntheticFile], int], room: int) -> int:
        """How many first layers of the whole model have at most that size; 0 where not even one has.

        size: of such a model; it grows with the number of layers.
        """
        whole = self.whole or self
        counts = range(1, whole.block_count + 1)
        return bisect_right(counts, room, key=lambda count: size(SyntheticFile.named(whole.path, count)))

    def close(self) -> None:
        """Forget the weights that were made, of every SyntheticFile."""
        forget_weights()

    def __enter__(self) -> SyntheticFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _layers(tensors: Mapping[str, SyntheticTensor]) -> list[dict[str, SyntheticTensor]]:
    """The tensors of each layer, by their names within its block."""
    layers: dict[str, dict[str, SyntheticTensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            _, number, rest = name.split(".", 2)
            layers.setdefault(number, {})[rest] = tensor
    return list(layers.values())


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
    *block, name, suffix = full_name.split(".")  # block: ["blk", its number], or of a tensor outside the layers
    if len(dims) == 1 or suffix == "bias" or BY_ROW.search(full_name):
        return GGML.F32
    return fitting_type(type_of(name, int(block[1]) if block[:1] == ["blk"] else 0), dims[-1])
