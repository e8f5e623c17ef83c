"""What a model family needs of a file: GGUFFile has it, and kqprefill.synthetic.SyntheticFile, which is no file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
import math
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .types import GGML, GGML_QUANT_SIZES

_Self = TypeVar("_Self", bound="ModelTensor")


@dataclass(frozen=True)
class ModelTensor(ABC):
    """A tensor of a model, or a part of one: `nbytes` bytes from `offset` on of what holds them.

    name: its GGUF name. shape: in NumPy's order, slowest dimension first, so that a matrix is [rows, columns]; the
    reverse of GGUF's ne[]. type: its ggml type.
    """

    name: str
    shape: tuple[int, ...]
    type: GGML
    offset: int = 0

    @property
    @abstractmethod
    def data(self) -> NDArray[np.uint8]:
        """The quantised bytes, uint8 [..., row bytes]; not to be written to."""

    @property
    def stored(self) -> NDArray[np.uint8]:
        """The contiguous bytes of the file that the data are, or are taken from: what to read ahead."""
        return self.data

    @property
    def nbytes(self) -> int:
        """The size of the data."""
        return nbytes_of(self.shape, self.type)

    def item(self: _Self, index: int) -> _Self:
        """What stands at that index of the first dimension, as a tensor of its own: one matrix of a stack."""
        return self._part(f"{self.name}[{index}]", self.shape[1:], index)

    def rows(self: _Self, begin: int, end: int) -> _Self:
        """Those rows of a matrix, or elements of an F32 vector, as a tensor of their own."""
        return self._part(f"{self.name}[{begin}:{end}]", (end - begin, *self.shape[1:]), begin)

    def picked(self, rows: NDArray[np.intp], name: str) -> ModelTensor:
        """Those rows of a matrix, in that order, as a tensor of that name; its data are copies."""
        return PickedRows(name, (len(rows), *self.shape[1:]), self.type, base=self, picks=rows)

    def within(self, begin: int, end: int) -> ModelTensor:
        """Those rows of each matrix of a stack, as a stack of their own; its data are a view."""
        shape = (self.shape[0], end - begin, *self.shape[2:])
        return RowsOfEach(f"{self.name}[:,{begin}:{end}]", shape, self.type, base=self, begin=begin)

    def _part(self: _Self, name: str, shape: tuple[int, ...], index: int) -> _Self:
        """What begins at that index of the first dimension and has that shape."""
        return replace(self, name=name, shape=shape, offset=self.offset + index * (self.nbytes // self.shape[0]))


@dataclass(frozen=True)
class PickedRows(ModelTensor):
    """Rows of another tensor."""

    base: ModelTensor = field(kw_only=True)
    picks: NDArray[np.intp] = field(kw_only=True, compare=False)

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.base.data[self.picks]

    @property
    def stored(self) -> NDArray[np.uint8]:
        return self.base.stored


@dataclass(frozen=True)
class RowsOfEach(ModelTensor):
    """Some rows of each matrix of a stack; of one of them they follow one another."""

    base: ModelTensor = field(kw_only=True)
    begin: int = field(kw_only=True)

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.base.data[:, self.begin : self.begin + self.shape[1]]

    @property
    def stored(self) -> NDArray[np.uint8]:
        return self.base.stored

    def item(self, index: int) -> ModelTensor:  # type: ignore[override]
        return self.base.item(index).rows(self.begin, self.begin + self.shape[1])


class ModelFile(Protocol):
    """Where a model comes from: its metadata and its tensors, by their GGUF names. path: its name, for messages."""

    @property
    def path(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, ModelTensor]: ...

    def close(self) -> None:
        """Give the tensors' memory back. Their data must not be read afterwards."""


def nbytes_of(shape: tuple[int, ...], ggml_type: GGML) -> int:
    """The size of a tensor of that shape and type, whose rows are whole blocks."""
    block_elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    return math.prod(shape) // block_elements * block_bytes
