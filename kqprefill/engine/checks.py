"""What is held against a model before and after it runs: a prompt's token ids, and the logits that came out."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
import math
import os
from typing import Any

import numpy as np

from ..core import Float32Array, Int32Array
from ..errors import DAMAGED_WEIGHTS, BackendError, InputError
from ..gguf.keys import described

_SUMMED_AT_ONCE = 1 << 24  # logits that one thread looks at before another could


def token_ids(tokens: Any, vocab_size: int) -> Int32Array:
    """Ids of a vocabulary of so many tokens as int32 [T], of any flat sequence of integers (True is none).

    Raises InputError, which names the first that is no id.
    """
    wanted = "tokens must be a flat sequence of integers"
    if isinstance(tokens, (str, bytes, Mapping)) or not hasattr(tokens, "__len__"):
        kind = f"the text {described(tokens)}; text is a prompt" if isinstance(tokens, str) else described(tokens)
        raise InputError(f"{wanted}, not {kind}")
    if isinstance(tokens, (list, tuple)):
        # Most lists hold nothing but int, which a set of their types tells soonest.
        wrong = tuple(kind for kind in set(map(type, tokens)) if kind is not int and not issubclass(kind, np.integer))
        if wrong:
            at, value = next((at, value) for at, value in enumerate(tokens) if type(value) in wrong)
            raise InputError(f"{wanted}: position {at} has {described(value)}")
    try:
        array = np.asarray(tokens)
    except (ValueError, TypeError):
        raise InputError(wanted) from None
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int32)
    beyond_64_bits = array.dtype == object and array.ndim == 1 and all(type(token) is int for token in array)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and not beyond_64_bits):
        raise InputError(f"{wanted}, not {array.dtype} of shape {list(array.shape)}")
    if array.min() < 0 or array.max() >= vocab_size:
        at = int(((array < 0) | (array >= vocab_size)).astype(bool).argmax())
        raise InputError(
            f"token {described(int(array[at]))} at position {at} is not in the vocabulary (0 to {vocab_size - 1})"
        )
    return array.astype(np.int32)


def refuse_non_finite(logits: Float32Array | None, logit: float, logprob: float, start: int, count: int) -> None:
    """Raise BackendError, which names the first position whose logits are not finite, if there is one.

    logits: float32 [V] or [T, V] of the last of `count` positions that begin at `start`, or None where only the greedy
    token's logit and log-probability are known.
    """
    last = start + count - 1
    if logits is not None:
        rows = logits if logits.ndim == 2 else logits[None]
        bad = first_non_finite_row(rows)
        if bad is not None:
            what = "NaN" if np.isnan(rows[bad]).any() else "infinities"
            raise BackendError(f"the logits of position {last - len(rows) + 1 + bad} hold {what}: {DAMAGED_WEIGHTS}")
    if not (math.isfinite(logit) and math.isfinite(logprob)):
        what = "NaN" if math.isnan(logit) else "infinities"
        raise BackendError(f"the logits of position {last} hold {what}: {DAMAGED_WEIGHTS}")


def first_non_finite_row(rows: Float32Array) -> int | None:
    """The first row [V] of rows [T, V] that is not finite throughout.

    A row's sum is read at the rate of memory, and is finite only where the row is; where it overflowed, each is looked
    at.
    """
    step = max(1, _SUMMED_AT_ONCE // rows.shape[1])
    pieces = [(at, rows[at : at + step]) for at in range(0, len(rows), step)]

    def look(piece: tuple[int, Float32Array]) -> int | None:
        at, part = piece
        with np.errstate(all="ignore"):
            suspects = np.flatnonzero(~np.isfinite(part.sum(axis=1)))
        return next((at + int(row) for row in suspects if not np.isfinite(part[row]).all()), None)

    if len(pieces) == 1:
        return look(pieces[0])
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as pool:
        return next((bad for bad in pool.map(look, pieces) if bad is not None), None)
