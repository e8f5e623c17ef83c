"""How large the batches that score a model are where layers are streamed: the copies cost a batch the same whatever
its tokens, so that larger ones hide them."""

from __future__ import annotations

from collections.abc import Callable

from ...core import BATCH_TOKENS, FIRST_TOKENS
from ...errors import BackendError
from ..base import BatchSize
from .bounds import Seconds, Speed
from .weights.plan import Plan

MOST_TOKENS = 32768
_STEP = 4096  # tokens: sizes are multiples of it, and so of most contexts that perplexity is asked for
_HIDDEN = 0.9  # of the arithmetic, that copies may take to be hidden: the arithmetic is not known better
_ENOUGH = 0.98  # of the best rate: a batch that is larger for the rest would only take memory


def choose_batch(speed: Speed, plan_for: Callable[[int], Plan]) -> tuple[Plan, BatchSize]:
    """The plan for batches to score where the caller does not say how large they are, and the size.

    It is BATCH_TOKENS where no layer is streamed. Else it is the smallest that hides the copies, of those up to
    MOST_TOKENS that fit; where none does, the one of the best rate: a larger batch takes memory from layers that could
    stay. plan_for(tokens): the plan for batches with so many targets; raises BackendError where they do not fit.
    """
    plan = plan_for(BATCH_TOKENS)
    if not plan.streamed:
        return plan, BatchSize()
    looked_at = {BATCH_TOKENS: (plan, speed.seconds(plan, BATCH_TOKENS, ranks=True))}

    def is_enough(tokens: int) -> bool:
        """Whether a larger one need not be looked at."""
        try:
            larger = plan_for(tokens)
        except BackendError:
            return True
        taken = speed.seconds(larger, tokens, ranks=True)
        looked_at[tokens] = larger, taken
        return _hides(taken)

    low, high = BATCH_TOKENS // _STEP, MOST_TOKENS // _STEP
    if not _hides(looked_at[BATCH_TOKENS][1]) and is_enough(high * _STEP):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle * _STEP) else (middle, high)
    rates = {tokens: tokens / taken.all for tokens, (_, taken) in looked_at.items()}
    hiding = [tokens for tokens, (_, taken) in looked_at.items() if _hides(taken)]
    tokens = min(hiding or (tokens for tokens, rate in rates.items() if rate >= _ENOUGH * max(rates.values())))
    plan, taken = looked_at[tokens]
    return plan, BatchSize(tokens, first_tokens(speed, plan, tokens), _why(tokens, taken))


def first_tokens(speed: Speed, plan: Plan, tokens: int) -> int:
    """Of the first of batches of so many tokens under a plan: where layers are streamed, a batch of less than hides
    their copies would not end sooner."""
    first = FIRST_TOKENS
    while first < tokens and not _hides(speed.seconds(plan, first, ranks=True)):
        first *= 2
    return min(first, tokens)


def _hides(taken: Seconds) -> bool:
    """Whether the arithmetic hides the copies, to all that is known."""
    return taken.copying <= _HIDDEN * taken.resident


def _why(tokens: int, taken: Seconds) -> str:
    copies, computed = f"{taken.bus:.3f} s of copies over the bus", f"{taken.resident:.3f} s of arithmetic"
    if taken.share == 1:
        return f"batches of {tokens} tokens: {computed} hide {copies}"
    return f"batches of {tokens} tokens: {computed} for {copies}, {taken.share:.0%} of the rate if all layers stayed"
