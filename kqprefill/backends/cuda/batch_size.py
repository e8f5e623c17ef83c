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
_MORE_BYTES = 16 << 20  # of likeliest tokens that were not planned for: of the allocator's slack
_STEP = 4096  # tokens: sizes are multiples of it, and so of most contexts that perplexity is asked for
_HIDDEN = 0.9  # of the arithmetic, that copies may take to be hidden: the arithmetic is not known better
_OF_RESIDENT = 0.97  # of the rate if all layers stayed: what unpacking takes is then spread over enough tokens
_ENOUGH = 0.98  # of the best rate, where none has that: a batch that is larger for the rest would only take memory


def choose_batch(speed: Speed, plan_for: Callable[[int], Plan]) -> tuple[Plan, BatchSize]:
    """The plan for batches to score where the caller does not say how large they are, and the size.

    It is BATCH_TOKENS where no layer is streamed. Else it is the smallest that has the rate of resident layers (but for
    3%), of those up to MOST_TOKENS that fit; where none has, the one of the best rate: a larger batch takes memory from
    layers that could stay. plan_for(tokens): the plan for batches with so many targets; raises BackendError where they
    do not fit, and so does this where BATCH_TOKENS do not.
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
        return _is_free(taken)

    low, high = BATCH_TOKENS // _STEP, MOST_TOKENS // _STEP
    if not _is_free(looked_at[BATCH_TOKENS][1]) and is_enough(high * _STEP):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle * _STEP) else (middle, high)
    rates = {tokens: tokens / taken.all for tokens, (_, taken) in looked_at.items()}
    free = [tokens for tokens, (_, taken) in looked_at.items() if _is_free(taken)]
    tokens = min(free or (tokens for tokens, rate in rates.items() if rate >= _ENOUGH * max(rates.values())))
    plan, taken = looked_at[tokens]
    return plan, BatchSize(tokens, first_tokens(speed, plan, tokens), _why(tokens, taken))


def first_tokens(speed: Speed, plan: Plan, tokens: int) -> int:
    """Of the first of batches of so many tokens under a plan: where layers are streamed, a batch of less than hides
    their copies would not end sooner."""
    first = FIRST_TOKENS
    while first < tokens and not _hides(speed.seconds(plan, first, ranks=True)):
        first *= 2
    return min(first, tokens)


def with_likeliest(size: BatchSize, top: int, planned: int, nbytes: int) -> BatchSize:
    """The size where `top` likeliest tokens are named at each place, of `nbytes` each, and there is room for `planned`:
    more than BATCH_TOKENS only where the others take little."""
    if top <= planned:
        return size
    most = max(BATCH_TOKENS, _MORE_BYTES // (nbytes * (top - planned)) // _STEP * _STEP)
    if size.tokens <= most:
        return size
    why = f"batches of {most} tokens: {size.tokens} would hide the copies over the bus, but for the {top} likeliest"
    return BatchSize(most, min(most, size.first), why)


def _hides(taken: Seconds) -> bool:
    """Whether the arithmetic hides the copies, to all that is known."""
    return taken.copying <= _HIDDEN * taken.resident


def _is_free(taken: Seconds) -> bool:
    """Whether larger batches would not be faster."""
    return _hides(taken) and taken.share >= _OF_RESIDENT


def _why(tokens: int, taken: Seconds) -> str:
    hides = "hides" if taken.copying <= taken.computing else "does not hide"
    return (
        f"batches of {tokens} tokens: computing, {taken.computing:.3f} s, {hides} the copies over the bus, "
        f"{taken.bus:.3f} s; about {taken.share:.0%} of the rate with all layers on the GPU"
    )
