"""The inputs of products, told to a collector, and their squares summed in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...collector import Collector, Squares
from ...core import Float32Array
from ...models.ops import Ops
from ...models.weights import Weight

_ROWS = 256  # whose squares exist at a time


class CpuCollector(Collector):
    """A Collector whose sums are NumPy arrays."""

    def __init__(self, output: bool) -> None:
        super().__init__(output)
        self._sums: dict[str, Squares] = {}

    def add(self, weight: Weight, rows: Float32Array) -> None:
        """Rows [T, columns] are multiplied by this weight, perhaps one of a stack."""
        name = self.sharing([weight.name], rows)
        if name is None:
            return
        index, count = weight.of_stack or (0, 1)
        columns = rows.shape[1]
        if name not in self._sums:
            self._sums[name] = Squares(np.zeros(count * columns), np.zeros(count, np.int64))
        own = self._sums[name].sums[index * columns : (index + 1) * columns]
        for begin in range(0, len(rows), _ROWS):
            own += np.square(rows[begin : begin + _ROWS], dtype=np.float64).sum(axis=0)
        self._sums[name].counts[index] += len(rows)

    def sums(self) -> Mapping[str, Squares]:
        return self._sums

    def close(self) -> None:
        self._sums.clear()


class HearingOps(Ops):
    """Ops that tell a CpuCollector what they multiply."""

    collector: Any  # CpuCollector | None

    def hear(self, weight: Weight, rows: Float32Array) -> None:
        """Rows [T, columns] are multiplied by this weight."""
        if self.collector is not None:
            self.collector.add(weight, rows)
