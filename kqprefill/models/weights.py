"""A file's tensors, checked, as a family's page names them: `w.attn_q` is blk.N.attn_q.weight with its bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
import re
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..gguf import ModelFile, ModelTensor
from ..gguf.dequantize import SUPPORTED

# GGUF tensor name, without `.weight` -> shape. A trailing `?` marks a tensor that a file may lack; a name that ends in
# `=` before that is the tensor's whole name, as `ssm_a=` or `exp_probs_b.bias=?`; a `+` there marks a vector that may
# have a bias, as any matrix may.
Shapes: TypeAlias = dict[str, tuple[int, ...]]
# GGUF tensor name of a matrix that holds several -> {name of each: how many rows it has, one matrix under another; or
# which rows are its own}. Of a stack, each matrix holds several.
Parts: TypeAlias = dict[str, dict[str, int | NDArray[np.intp]]]

# Tensors of two dimensions and more that nothing is multiplied by as by a matrix. Converters write them with dimensions
# of 1 that say nothing.
BY_ROW = re.compile(r"(?:_norm|\.conv|conv1d(?:_[qkv])?|altup_\w+_coef)\.weight$|\.ssm_[ad]$")


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, columns] (y = x · Wᵀ + b) and its bias [rows], where the file has one; or the matrices of all
    experts [experts, rows, columns] and their biases [experts, rows]; or a vector [n].

    of_stack: for one matrix of a stack, its number there and how many the stack has.
    """

    tensor: ModelTensor
    bias: ModelTensor | None = None
    of_stack: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The tensor's GGUF name."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor.shape

    @property
    def is_matrix(self) -> bool:
        """Whether something is multiplied by it as a matrix; what a convolution, a norm or a recurrence has a row of
        for each channel or head is not."""
        return len(self.shape) >= 2 and not BY_ROW.search(self.name)

    def expert(self, index: int) -> Weight:
        """The matrix, and the bias, of one of the experts."""
        return Weight(self.tensor.item(index), self.bias and self.bias.item(index), (index, self.shape[0]))


class Weights:
    """Weights by their GGUF names, as attributes: without `.weight`, and with `_` for any other dot."""

    def __init__(self, file: ModelFile, prefix: str, shapes: Shapes, parts: Parts | None = None) -> None:
        """prefix: of the tensors' names in the file, such as `blk.0.`. parts: matrices to be cut into several weights.

        Raises ModelError where a tensor is missing, misshapen or of an unsupported type.
        """
        self._prefix = prefix
        self._by_name: dict[str, Weight] = {}
        for declared, shape in shapes.items():
            full, bias_name, optional = tensor_names(declared, shape)
            name = declared.rstrip("?=+").replace(".", "_")
            tensor = file.tensors.get(prefix + full)
            if tensor is None:
                if not optional:
                    raise ModelError(f"{file.path}: tensor {prefix}{full} is missing")
                continue
            bias = file.tensors.get(prefix + bias_name) if bias_name else None
            _check(file, tensor, shape)
            if bias is not None:
                _check(file, bias, bias_shape(shape))
            whole = Weight(tensor, bias)
            self._by_name.update(_cut(whole, parts[name]) if parts and name in parts else {name: whole})
        for name in (part for rows in (parts or {}).values() for part in rows):
            if name not in self._by_name:  # neither by itself nor within another
                raise ModelError(f"{file.path}: tensor {prefix}{name}.weight is missing")

    def __getattr__(self, name: str) -> Weight:
        try:
            return self._by_name[name]
        except KeyError:
            raise AttributeError(f"{self._prefix}{name} is not declared in this family's shapes") from None

    def get(self, name: str) -> Weight | None:
        """The weight, or None where the file does not have it (names declared with a trailing `?`)."""
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[Weight]:
        return iter(self._by_name.values())


def tensor_names(declared: str, shape: tuple[int, ...]) -> tuple[str, str | None, bool]:
    """(a tensor's name in the file, that of its bias, whether the file may lack it), of a name in Shapes.

    Matrices may have a bias `[*shape[:-1]]`, vectors that are declared so one of their own shape; tensors that are
    declared by their whole names have none.
    """
    optional, name = declared.endswith("?"), declared.removesuffix("?")
    if name.endswith("="):
        return name.removesuffix("="), None, optional
    biased, name = len(shape) >= 2 or name.endswith("+"), name.removesuffix("+")
    return f"{name}.weight", f"{name}.bias" if biased else None, optional


def bias_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a matrix, or a stack of them, without the columns; of a vector its own."""
    return shape[:-1] if len(shape) >= 2 else shape


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _cut(whole: Weight, rows: Mapping[str, int | NDArray[np.intp]]) -> dict[str, Weight]:
    """The matrices that `whole` holds, by name (see Parts)."""
    cut: dict[str, Weight] = {}
    begin, stacked = 0, len(whole.shape) == 3
    for name, own in rows.items():
        its = slice(begin, begin + own) if isinstance(own, int) else own
        tensor, bias = whole.tensor, whole.bias
        cut[name] = Weight(_part(tensor, its, stacked, name), bias and _part(bias, its, stacked, name))
        begin += own if isinstance(own, int) else 0
    return cut


def _part(tensor: ModelTensor, rows: slice | NDArray[np.intp], stacked: bool, name: str) -> ModelTensor:
    """Those rows of a tensor, or of each of a stack's, as a tensor that is named after the part."""
    called = f"{tensor.name}[{name}]"
    if not isinstance(rows, slice):
        return tensor.picked(rows, called)
    cut = tensor.within if stacked else tensor.rows
    return replace(cut(rows.start, rows.stop), name=called)


def _check(file: ModelFile, tensor: ModelTensor, shape: tuple[int, ...]) -> None:
    if tensor.type not in SUPPORTED:
        raise ModelError(f"{file.path}: tensor {tensor.name} has type {tensor.type.name}, which is not supported yet")
    found, wanted = tensor.shape, tuple(shape)
    if BY_ROW.search(tensor.name):
        found, wanted = _squeezed(found), _squeezed(wanted)
    if found != wanted:
        raise ModelError(
            f"{file.path}: tensor {tensor.name} is {list(tensor.shape)}, but the metadata asks for {list(shape)}"
        )
