"""What a model family needs of a file: GGUFFile has it, and so has kqprefill.synthetic.SyntheticFile, which is no file at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .types import GGML


class ModelTensor(Protocol):
    """A tensor of a model.

    name: its GGUF name. shape: in NumPy's order, slowest dimension first, so that a matrix is [rows, columns]. type: its
    ggml type. nbytes: the size of its data.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def type(self) -> GGML: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def data(self) -> NDArray[np.uint8]:
        """The quantised bytes, uint8 [..., row bytes]; whoever asks must not write to them."""

    def item(self, index: int) -> ModelTensor:
        """What stands at that index of the first dimension, as a tensor of its own: one matrix of a stack."""

    def rows(self, begin: int, end: int) -> ModelTensor:
        """Those rows of a matrix (or elements of a vector), as a tensor of their own."""


class ModelFile(Protocol):
    """Where a model comes from: its metadata and its tensors, both by their GGUF names. path: its name for messages."""

    @property
    def path(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, ModelTensor]: ...

    def close(self) -> None:
        """Give the tensors' memory back. Their data must not be read afterwards."""
