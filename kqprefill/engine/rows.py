"""Rows of logits on the host, a few at a time, on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array

Result = TypeVar("Result")
_AT_ONCE = (
    1 << 21
)  # logits that a core looks at before it takes others: they and what is made of them stay in its cache


def by_rows(function: Callable[[slice], Result], rows: int, width: int) -> list[Result]:
    """function(part) of all parts of so many rows of `width` logits, in order; several run at once, as NumPy lets
    them."""
    step = max(1, _AT_ONCE // width)
    parts = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
    if len(parts) == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        return list(pool.map(function, parts))


def largest_and_sum(logits: Float32Array) -> tuple[Float32Array, NDArray[np.float64]]:
    """Of each row of logits [n, V] the largest, M, and the sum of exp(l - M), added up in float64; [n] each."""
    largest = logits.max(axis=-1)
    exponentials: NDArray[Any] = np.exp(logits - largest[:, None])
    return largest, exponentials.sum(axis=-1, dtype=np.float64)
