"""The perplexity of a long text, cut into windows as llama-perplexity (llama.cpp) cuts it, so that figures compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import Progress
from ..errors import BackendError, InputError

if TYPE_CHECKING:
    from .model import Model

CONTEXT = 512  # llama-perplexity's


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

    Windows of `context` tokens follow one another, at most `most` of them, and what is left over is left out; of each
    the second half is scored, each token given all before it in the window (llama.cpp, tools/perplexity: `perplexity`).
    bos: what each window's first token is replaced by (files that ask for BOS), or None. batch_tokens: of a batch of
    several windows, as in `Model.score`. progress("windows", done, total) hears how far it is, in layers of windows.
    Raises InputError where a window does not fit the model, or the text does not fill one; BackendError where a
    log-probability is not finite.
    """
    if not 4 <= context <= model.config.context_length:
        raise InputError(f"a context of {context} tokens: 4 to the model's {model.config.context_length} are possible")
    ids = list(tokens)
    count = len(ids) // context
    if not count:
        raise InputError(
            f"the text has {len(ids)} tokens, but one window takes {context}: give a longer text, or a smaller context"
        )
    count, half = min(count, most or count), context // 2

    def window(index: int) -> dict[str, Any]:
        own = ids[index * context : (index + 1) * context]
        if bos is not None:
            own[0] = bos
        return {"tokens": own[: half + 1], "completion": own[half + 1 :]}

    taken = done = 0  # windows that batches have taken, and that are scored

    def windows() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for taken in range(1, count + 1):
            yield window(taken - 1)

    def hear(stage: str, layers: int, of: int) -> None:
        assert progress is not None
        if stage == "prefill":
            stage, layers, of = "windows", done * of + (taken - done) * layers, count * of
        progress(stage, layers, of)

    parts = []
    for done, scored in enumerate(model.score(windows(), batch_tokens, progress=progress and hear), 1):
        if not np.isfinite(scored.logprobs).all():
            at = (done - 1) * context + half + 1 + int((~np.isfinite(scored.logprobs)).argmax())
            raise BackendError(
                f"the log-probability of token {at} of the text is not finite: the file's weights are damaged or out "
                "of range"
            )
        parts.append(-scored.logprobs.astype(np.float64))
    surprisal = np.concatenate(parts)
    n, mean = len(surprisal), float(surprisal.mean())
    largest = sys.float_info.max
    value = math.exp(mean) if mean < math.log(largest) else largest
    error = value * math.sqrt(float(surprisal.var()) / max(1, n - 1))
    return Perplexity(value, min(error, largest), n, count)
