"""How far a model's distributions are from another's over a text: the statistics of llama-perplexity --kl-divergence.

Of each scored token, with p what the base says and r what the model says: the surprisals of the token that came, the
Kullback-Leibler divergence sum p ln(p / r), the difference of the token's probabilities, and whether both have the same
likeliest token (llama.cpp, tools/perplexity/perplexity.cpp: `kl_divergence`).
"""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..core import Brief, Float32Array, Int32Array, Progress
from ..errors import InputError
from .logits_file import LogitsFile
from .rows import by_rows, largest_and_sum
from .windows import Windows, batches_of, heard, window_logits

if TYPE_CHECKING:
    from .model import Model

Float64Array: TypeAlias = NDArray[np.float64]

_KLD_SHARES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)
_CHANGE_SHARES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)
_FLOOR = np.float32(-16)  # llama-perplexity's: tokens that the base says less of are left out


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, repr=False)
class Divergence(Brief):
    """A model's distributions against a base's, over n_tokens tokens of so many windows.

    correlation: of the surprisals. log_ratio, ratio and difference: of the model's perplexity to the base's. kld: in
    nats. change: of the probability of the tokens that came, model's less base's; change_rms: the root of its mean
    square. same_top: the share of places where both have the same likeliest token. kld_at, change_at: quantiles, by the
    share of places that have less. klds, changes: of each place, float32 [n].
    """

    n_tokens: int
    windows: int
    perplexity: Estimate
    base_perplexity: Estimate
    correlation: float
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kld: Estimate
    kld_at: dict[float, float]
    change: Estimate
    change_at: dict[float, float]
    change_rms: Estimate
    same_top: Estimate
    klds: Float32Array
    changes: Float32Array


@dataclass(frozen=True)
class _Places:
    """What is kept of places: surprisals float32 [n] under the model and the base, divergences in nats float64 [n],
    whether the likeliest tokens are the same [n]."""

    surprisal: Float32Array
    base_surprisal: Float32Array
    kld: Float64Array
    same: NDArray[np.bool_]


def check_vocabularies(model: Model, base: Model | LogitsFile) -> None:
    """Raise InputError where the vocabularies of both are not as large as each other."""
    vocab_size = base.vocab_size if isinstance(base, LogitsFile) else base.config.vocab_size
    name = base.path if isinstance(base, LogitsFile) else base.file.path
    if vocab_size != model.config.vocab_size:
        raise InputError(
            f"{name} has a vocabulary of {vocab_size} tokens, and {model.file.path} one of {model.config.vocab_size}: "
            "their distributions cannot be compared"
        )


def divergence(
    model: Model,
    base: Model | LogitsFile,
    windows: Windows,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """The Divergence of an open Model from a base over windows of a text.

    base: another open Model, which runs the same batches, or a LogitsFile of these windows. batch_tokens: of a batch of
    several windows, at most. progress("windows", done, total) hears how far it is, in layers of windows. Raises
    InputError where the vocabularies are not as large as each other; KqprefillError where the file's rows are damaged;
    BackendError where the device fails, or where a logit is not finite.
    """
    others = [] if isinstance(base, LogitsFile) else [base]
    check_vocabularies(model, base)
    parts: list[_Places] = []
    for batch in batches_of(windows, [model, *others], batch_tokens):
        n, targets = batch.stop - batch.start, windows.targets(batch)
        logits, *base_logits = [
            window_logits(one, windows, batch, heard(progress, len(windows), batch.start, n, run, 1 + len(others)))
            for run, one in enumerate([model, *others])
        ]

        def places(part: slice) -> _Places:
            if isinstance(base, LogitsFile):
                first = batch.start * windows.scored  # noqa: B023 (it is called in this turn of the loop)
                rows = base.rows(slice(first + part.start, first + part.stop))
                return _from_packed(logits[part], *rows, targets[part])  # noqa: B023
            return _from_logits(logits[part], base_logits[0][part], targets[part])  # noqa: B023

        parts += by_rows(places, *logits.shape)
    return _divergence(parts, len(windows))


def _from_logits(logits: Float32Array, base: Float32Array, targets: Int32Array) -> _Places:
    """Places of both models' logits [n, V].

    The sum is of p (l_base - l), whose differences of near numbers are exact, and the logarithms of both sums of
    exponentials make up for the rest.
    """
    (largest, total), (base_largest, base_total) = largest_and_sum(logits), largest_and_sum(base)
    weights = np.exp(base - base_largest[:, None])
    moved = np.einsum("nv,nv->n", weights, base - logits, dtype=np.float64) / base_total
    log_sum, base_log_sum = largest + np.log(total), base_largest + np.log(base_total)
    at = np.arange(len(logits)), targets
    return _Places(
        (log_sum - logits[at]).astype(np.float32),
        (base_log_sum - base[at]).astype(np.float32),
        moved - (base_log_sum - log_sum),
        logits.argmax(axis=-1) == base.argmax(axis=-1),
    )


def _from_packed(
    logits: Float32Array, scale: Float32Array, least: Float32Array, numbers: NDArray[np.uint16], targets: Int32Array
) -> _Places:
    """Places of a model's logits [n, V] and a file's rows, in float32 where llama.cpp has it."""
    largest, total = largest_and_sum(logits)
    log_total = np.log(total).astype(np.float32)
    at = np.arange(len(logits)), targets
    base = scale * numbers.astype(np.float32) + least
    terms = np.exp(base) * ((base - logits) + (largest + log_total)[:, None])
    terms[base <= _FLOOR] = 0
    return _Places(
        largest + log_total - logits[at],
        -base[at],
        terms.sum(axis=-1, dtype=np.float64),
        logits.argmax(axis=-1) == numbers.argmax(axis=-1),
    )


@np.errstate(all="ignore")  # what is beyond a float's range is infinite, and nothing over nothing is NaN
def _divergence(parts: list[_Places], windows: int) -> Divergence:
    """The statistics of all places."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    surprisal, base_surprisal, klds, same = map(joined, ("surprisal", "base_surprisal", "kld", "same"))
    n = len(klds)
    changes: Float32Array = np.exp(-surprisal) - np.exp(-base_surprisal)
    own, base = _mean(surprisal), _mean(base_surprisal)
    both = _covariance(surprisal, base_surprisal)
    log_ratio = Estimate(own.value - base.value, _root(own.error**2 + base.error**2 - 2 * both))
    perplexity, base_perplexity, ratio = _exp(own), _exp(base), _exp(log_ratio)
    difference = Estimate(
        perplexity.value - base_perplexity.value,
        _root(perplexity.error**2 + base_perplexity.error**2 - 2 * perplexity.value * base_perplexity.value * both),
    )
    squares = _mean(np.square(changes))
    rms = math.sqrt(squares.value)
    share = float(same.mean())
    return Divergence(
        n_tokens=n,
        windows=windows,
        perplexity=perplexity,
        base_perplexity=base_perplexity,
        correlation=float(np.float64(both) / (own.error * base.error)),
        log_ratio=log_ratio,
        ratio=ratio,
        difference=difference,
        kld=_mean(klds),
        kld_at=_quantiles(klds, _KLD_SHARES),
        change=_mean(changes),
        change_at=_quantiles(changes, _CHANGE_SHARES),
        change_rms=Estimate(rms, float(np.float64(0.5) / rms * squares.error)),
        same_top=Estimate(share, math.sqrt(share * (1 - share) / max(1, n - 1))),
        klds=klds.astype(np.float32),
        changes=changes,
    )


def _mean(values: NDArray[Any]) -> Estimate:
    """The mean of values [n], and its standard error; of ten values or fewer none is told."""
    n, mean = len(values), float(values.mean(dtype=np.float64))
    variance = float(np.square(values).mean(dtype=np.float64)) - mean * mean
    return Estimate(mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0)


def _covariance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of the means of values [n]."""
    if len(a) < 10:
        return 0.0
    product = float((a * b).mean(dtype=np.float64))
    return (product - float(a.mean(dtype=np.float64)) * float(b.mean(dtype=np.float64))) / (len(a) - 1)


def _exp(of: Estimate) -> Estimate:
    """exp of a figure; its error to first order."""
    value = float(np.exp(of.value))
    return Estimate(value, value * of.error)


def _root(square: float) -> float:
    return math.sqrt(square) if square > 0 else 0.0


def _quantiles(values: NDArray[Any], shares: tuple[float, ...]) -> dict[float, float]:
    """By the share of values [n] that are less: between two values on the line through them, in float32 as llama.cpp
    has it."""
    ordered = np.sort(values.astype(np.float32))
    last = len(ordered) - 1
    found = {}
    for share in shares:
        place = np.float32(share) * np.float32(last)
        below = min(int(place), last)
        part = place - np.float32(below)
        found[share] = float((1 - part) * ordered[below] + part * ordered[min(below + 1, last)])
    return found
