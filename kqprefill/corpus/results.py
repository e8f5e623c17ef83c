"""What is said of a record that was scored: the keys of a line of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING, Any

from ..errors import DAMAGED_WEIGHTS

if TYPE_CHECKING:
    from ..core import Float32Array
    from ..engine.scoring import Scored


NOT_FINITE = f"its logits hold NaN or infinities: {DAMAGED_WEIGHTS}"  # what is wrong with such a record


@dataclass(frozen=True)
class Wanted:
    """What of each token is asked for: its log-probability, the likeliest token at its place, the `top` likeliest."""

    per_token: bool = False
    greedy: bool = False
    top: int = 0

    @property
    def ranks(self) -> int:
        """How many likeliest tokens the model has to name."""
        return max(self.top, int(self.greedy))

    @property
    def keys(self) -> dict[str, bool]:
        """The keys of a result that options ask for, and whether these do."""
        return {
            "token_logprobs": self.per_token,
            "greedy_tokens": self.greedy,
            "top_tokens": self.top > 0,
            "top_logprobs": self.top > 0,
        }


def described(result: Scored | list[Scored], wanted: Wanted) -> dict[str, Any]:
    """A record's result (`Model.score`) as docs/json.md has it, but for "index" and what is handed on."""
    if not isinstance(result, list):
        return _stretch(result, wanted)
    means = [-math.inf if scored.mean_logprob is None else scored.mean_logprob for scored in result]
    best = max(range(len(result)), key=lambda i: result[i].logprob)
    per_token = max(range(len(result)), key=lambda i: means[i])
    choices = [_stretch(scored, wanted) for scored in result]
    return {"best": best, "best_per_token": per_token, "choices": choices}


def all_finite(result: Scored | list[Scored]) -> bool:
    """Whether the model gave numbers; it does not where its weights are damaged."""
    return all(scored.finite for scored in (result if isinstance(result, list) else [result]))


def n_tokens_of(line: Mapping[str, Any]) -> int:
    """How many tokens a line of results says were scored, over all of its choices; 0 where it is an error."""
    return sum(result.get("n_tokens") or 0 for result in line.get("choices") or [line])


def _stretch(scored: Scored, wanted: Wanted) -> dict[str, Any]:
    perplexity = scored.perplexity
    line: dict[str, Any] = {
        "n_tokens": scored.n_tokens,
        "logprob": scored.logprob,
        "mean_logprob": scored.mean_logprob,
        "perplexity": None if perplexity == math.inf else perplexity,
    }
    if wanted.per_token:
        line["token_logprobs"] = _numbers(scored.logprobs)
    if wanted.greedy:
        line["greedy_tokens"] = scored.top_tokens[:, 0].tolist()
    if top := wanted.top:
        line["top_tokens"] = scored.top_tokens[:, :top].tolist()
        line["top_logprobs"] = [_numbers(row) for row in scored.top_logprobs[:, :top]]
    return line


def _numbers(floats: Float32Array) -> list[float]:
    """float32 as the shortest decimals that stand for them."""
    return [float(str(x)) for x in floats]
