"""The perplexity of a long text, cut into windows as llama-perplexity (llama.cpp) cuts it, so that figures compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core import Progress
from .windows import CONTEXT, Windows, heard, not_finite

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean surprisal over n_tokens tokens of so many windows, and its standard error; each the largest float
    where it would be beyond it."""

    value: float
    error: float
    n_tokens: int
    windows: int


def perplexity(
    model: Model,
    tokens: Iterable[int],
    context: int = CONTEXT,
    most: int | None = None,
    bos: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """The Perplexity of token ids [T] under an open Model.

    The text is cut into `Windows` of `context` tokens, at most `most` of them (kqprefill.engine.windows). bos: what
    each window's first token is replaced by (files that ask for BOS), or None. batch_tokens: of a batch of several
    windows, as in `Model.score`. progress("windows", done, total) hears how far it is, in layers of windows. Raises
    InputError where a window does not fit the model, or the text does not fill one; BackendError where a
    log-probability is not finite.
    """
    windows = Windows.of(tokens, context, most, bos, [model])
    before = count = 0  # windows of the batches before the last one that has been started, and its own

    def records() -> Iterator[dict[str, Any]]:
        for own in map(windows.window, range(len(windows))):
            yield {"tokens": own[: windows.first], "completion": own[windows.first :]}

    def starts(completed: int) -> None:
        nonlocal before, count
        before, count = before + count, completed

    def hear(stage: str, layers: int, of: int) -> None:
        heard(progress, len(windows), before, count)(stage, layers, of)

    parts = []
    scores = model.score(records(), batch_tokens, progress=progress and hear, starts=starts)
    for number, scored in enumerate(scores):
        if not np.isfinite(scored.logprobs).all():
            raise not_finite(windows, number * windows.scored + int((~np.isfinite(scored.logprobs)).argmax()))
        parts.append(-scored.logprobs.astype(np.float64))
    return perplexity_of(np.concatenate(parts), len(windows))


def perplexity_of(surprisal: NDArray[np.float64], windows: int) -> Perplexity:
    """The Perplexity of so many windows whose tokens' surprisals in nats are float64 [n]."""
    n, mean = len(surprisal), float(surprisal.mean())
    largest = sys.float_info.max
    value = math.exp(mean) if mean < math.log(largest) else largest
    error = value * math.sqrt(float(surprisal.var()) / max(1, n - 1))
    return Perplexity(value, min(error, largest), n, windows)
