"""The states in a CPU's cache, for whoever writes them to a file or reads them from one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from numpy.typing import NDArray

from ...core import Float32Array
from ..base import StateAccess, TakeRows
from .ops import CpuCache

_PIECE = 4096  # tokens


class CpuStates(StateAccess):
    """They are real values already, which no later layer changes."""

    def __init__(self, cache: CpuCache) -> None:
        self._cache = cache

    def rows(self, layer: int, end: int, wide: bool, take: TakeRows, live: bool = False) -> Callable[[], None]:
        first, second = self._cache.rows[layer]

        def give() -> None:
            for begin in range(0, end, _PIECE):
                piece = slice(begin, min(end, begin + _PIECE))
                take(begin, nullcontext((first[piece], second[piece])))

        return give

    def recurrence(self, layer: int) -> tuple[Float32Array, Float32Array]:
        matrices, rows = self._cache.recurrences[layer]
        return matrices.copy(), rows.copy()

    def write(self, layer: int, begin: int, first: NDArray[Any], second: NDArray[Any]) -> None:
        for kept, new in zip(self._cache.rows[layer], (first, second)):
            kept[begin : begin + len(new)] = new

    def write_recurrence(self, layer: int, matrices: Float32Array, rows: Float32Array) -> None:
        for kept, new in zip(self._cache.recurrences[layer], (matrices, rows)):
            kept[...] = new
