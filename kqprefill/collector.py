"""The squares of what goes into matrix products, summed over tokens: what importance matrices are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float64Array: TypeAlias = NDArray[np.float64]
Int64Array: TypeAlias = NDArray[np.int64]

OUTPUT = "output.weight"


@dataclass(frozen=True)
class Squares:
    """Of the inputs of one or several tensors.

    sums: of each input column the sum of its squares over tokens, float64 [counts * columns]: those of each matrix of a
    stack of experts, or of each head, after those of the one before. counts: how many rows were summed, int64 [experts]
    for a stack of experts and [1] for any other tensor.
    """

    sums: Float64Array
    counts: Int64Array

    def __add__(self, other: Squares) -> Squares:
        return Squares(self.sums + other.sums, self.counts + other.counts)


class Collector(ABC):
    """What ops tell of the inputs of their products (`Ops.collector`); a backend's keeps the sums where it computes.

    It wants the inputs of the layers' tensors, and of the output matrix where `output` says so, as llama-imatrix does
    (llama.cpp, tools/imatrix: `collect_imatrix`). Tensors that share an input share its sums: an input is told apart
    from others by which object it is, so the collector holds the inputs of a layer until the next begins.
    """

    def __init__(self, output: bool) -> None:
        self._output = output
        self._names: dict[str, dict[str, None]] = {}  # by the first of the tensors that share sums, all of them
        self._heard: dict[int, tuple[Any, str]] = {}  # by the id of an input: the input, and whose sums have it

    def begin_layer(self) -> None:
        """The inputs heard so far do not come again."""
        self._heard.clear()

    def sharing(self, tensors: Iterable[str], rows: Any) -> str | None:
        """The name of the sums that an input is to be added to; None where it has been, or nobody wants it.

        tensors: the names of what the input is multiplied by; of a part of a tensor, its name begins with the tensor's
        and a bracket.
        """
        names = [name for name in (tensor.partition("[")[0] for tensor in tensors) if self.wants(name)]
        if not names:
            return None
        _, known = self._heard.get(id(rows), (None, None))
        name = known or names[0]
        self._names.setdefault(name, {}).update(dict.fromkeys(names))
        self._heard[id(rows)] = rows, name
        return name if known is None else None

    def wants(self, name: str) -> bool:
        """Whether the inputs of a tensor of that name are summed."""
        return name.startswith("blk.") or (self._output and name == OUTPUT)

    @abstractmethod
    def sums(self) -> Mapping[str, Squares]:
        """What has been summed so far, by the names that `sharing` gave; waits for all batches that were started."""

    @abstractmethod
    def close(self) -> None:
        """Free the sums."""

    def squares(self) -> dict[tuple[str, ...], Squares]:
        """What has been summed so far, by the names of the tensors that share it, which are in order."""
        return {tuple(sorted(self._names[name])): squares for name, squares in self.sums().items()}
