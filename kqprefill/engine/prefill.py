"""What a prefill gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..core import Brief, Float32Array
from ..timeline import Stage


@dataclass(frozen=True, repr=False)
class Prefill(Brief):
    """What a prefill gives.

    token: the greedy next token's id, None for an empty prompt; logit and logprob (natural logarithm) are its own.
    logits: float32 [V] for "last", [T, V] for "all", else None. timings: {"prefill": seconds}. stages: {name: Stage}
    (kqprefill.timeline) where asked for, else None.
    """

    token: int | None
    logit: float | None
    logprob: float | None
    logits: Float32Array | None
    prompt_tokens: int
    timings: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Stage] | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The prompt's tokens by the time that they took; None where there was nothing to do."""
        seconds = self.timings.get("prefill")
        return self.prompt_tokens / seconds if seconds else None

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """[(token, natural log-probability)] of the likeliest next tokens, the lowest ids of equals first; needs
        logits."""
        assert self.logits is not None, "the prefill was not asked for logits"
        last = self.logits[-1] if self.logits.ndim == 2 else self.logits
        order = np.argsort(-last, kind="stable")[:count]
        shifted = last.astype(np.float64) - float(last[order[0]])
        return [(int(token), float(shifted[token] - np.log(np.exp(shifted).sum()))) for token in order]
