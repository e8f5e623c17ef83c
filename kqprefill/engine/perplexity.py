"""The perplexity of a long text, cut into windows as llama.cpp's llama-perplexity cuts it, so that the figures compare."""

from dataclasses import dataclass
import math

import numpy as np

from ..errors import InputError
from .scoring import BATCH_TOKENS

CONTEXT = 512  # llama-perplexity's


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean surprisal over n_tokens tokens of so many windows, and its standard error."""

    value: float
    error: float
    n_tokens: int
    windows: int


def perplexity(model, tokens, context=CONTEXT, most=None, bos=None, batch_tokens=BATCH_TOKENS, progress=None):
    """The Perplexity of token ids [T] under an open Model.

    Windows of `context` tokens follow one another, at most `most` of them, and what is left over is left out; of each the second
    half is scored, each token given all before it in the window (llama.cpp, tools/perplexity: `perplexity`). bos: what each
    window's first token is replaced by (files that ask for BOS), or None. progress("windows", done, total) hears how far it is.
    Raises InputError where a window does not fit the model, or the text does not fill one.
    """
    if not 4 <= context <= model.config.context_length:
        raise InputError(f"a context of {context} tokens: 4 to the model's {model.config.context_length} are possible")
    tokens = list(tokens)
    count = len(tokens) // context
    if not count:
        raise InputError(
            f"the text has {len(tokens)} tokens, but one window takes {context}: give a longer text, or a smaller context"
        )
    count, half = min(count, most or count), context // 2

    def window(index):
        ids = tokens[index * context : (index + 1) * context]
        if bos is not None:
            ids[0] = bos
        return {"tokens": ids[: half + 1], "completion": ids[half + 1 :]}

    surprisal = []
    for done, scored in enumerate(model.score(map(window, range(count)), batch_tokens), 1):
        surprisal.append(-scored.logprobs.astype(np.float64))
        if progress:
            progress("windows", done, count)
    surprisal = np.concatenate(surprisal)
    n, mean = len(surprisal), surprisal.mean()
    value = math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.nan
    return Perplexity(value, value * math.sqrt(surprisal.var() / max(1, n - 1)), n, count)
