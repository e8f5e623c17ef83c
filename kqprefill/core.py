"""What all parts of the package speak of: the batch that is computed, what is asked of it, and what comes back.

Shapes: T tokens in the batch, S targets, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Float32Array: TypeAlias = NDArray[np.float32]

# Hears how far something is: progress(stage, done, total).
Progress: TypeAlias = Callable[[str, int, int], None]

# Which logits are asked for: none, the last position's, every position's, those that a batch's targets are ranked by
# ("ranks"), or those after the targets' rows, as they are ("rows"); or, in their place, a vector of each of the batch's
# segments ("pooled").
Logits: TypeAlias = Literal["last", "all", "ranks", "rows", "pooled"] | None

# How the final norm's outputs at a sequence's positions become one vector: the last one's, their mean, the first's.
Pooling: TypeAlias = Literal["last", "mean", "cls"]

# Attention walks a sequence's keys in blocks of at most so many, which begin at multiples of the block's size. A
# segment that continues another has its own copy of the keys of the block that it begins in: fewer than this.
LARGEST_KEY_BLOCK = 128

# Whoever packs a batch keeps its rows of keys, such copies included, to so many times its tokens; the backend plans its
# memory for that many.
KEYS_PER_TOKEN = 2

# Tokens of a batch to score, where neither the caller nor the backend says more: a GPU's matrix units are busy from
# about 1000 on. The first batch has fewer, so that a person sees results soon; each after it may be twice as large.
BATCH_TOKENS = 8192
FIRST_TOKENS = 512


_MOST_SHOWN = 8  # elements of a list in a repr


def no_progress(stage: str, done: int, total: int) -> None:
    """A Progress for those who do not want to hear."""


class Brief:
    """A dataclass (with repr=False) whose repr is a line: of arrays their type and shape, of long lists the ends."""

    def __repr__(self) -> str:
        held = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={brief(value)}' for name, value in held)})"


def brief(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)) and len(value) > _MOST_SHOWN:
        return f"[{', '.join(map(brief, value[:_MOST_SHOWN]))}, … ({len(value)})]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {brief(held)}' for key, held in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(brief, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


@dataclass(frozen=True)
class Segment:
    """Rows of a batch that follow one another in a sequence: `length` of them from row `first`, at `position` and on.

    after: which of the batch's segments holds all the tokens before these, from the sequence's first on; None where
    there are none, or where a cache has them. Several segments may come after the same one.
    """

    first: int
    length: int
    position: int = 0
    after: int | None = None

    @property
    def rows(self) -> slice:
        """Its rows of the batch."""
        return slice(self.first, self.first + self.length)


@dataclass(frozen=True, repr=False)
class Targets(Brief):
    """Whose log-probabilities are asked for: token tokens[i], coming after row rows[i] of the batch; int32 [S] each.

    top: how many of the likeliest tokens are to be named as well.
    """

    rows: Int32Array
    tokens: Int32Array
    top: int = 0


@dataclass(frozen=True, repr=False)
class Batch(Brief):
    """The tokens of one prefill, int32 [T]: those of each segment, one segment after another.

    Without segments they are one sequence's, from position `start` on. A token sees the tokens before it in its own
    sequence, and no others. pooling: of what is asked for as "pooled".
    """

    tokens: Int32Array
    start: int = 0
    segments: tuple[Segment, ...] = ()
    targets: Targets | None = None
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(0, len(self.tokens), self.start),))

    @property
    def positions(self) -> Int32Array:
        """Each token's place in its sequence, int32 [T]."""
        return np.concatenate([np.arange(s.position, s.position + s.length, dtype=np.int32) for s in self.segments])

    @property
    def pooled_rows(self) -> Int32Array:
        """The rows whose mean is each segment's vector: from which on, and before which, int32 [segments, 2]."""
        parts = {"last": (-1, None), "cls": (0, 1), "mean": (0, None)}[self.pooling]
        rows = [range(s.first, s.first + s.length)[slice(*parts)] for s in self.segments]
        return np.array([(own.start, own.stop) for own in rows], np.int32)

    def count(self, logits: Logits) -> int:
        """How many of the positions have their logits computed."""
        if logits == "all":
            return len(self.tokens)
        if logits in ("ranks", "rows"):
            return len(self.targets.rows) if self.targets is not None else 0
        return 1


@dataclass(frozen=True, repr=False)
class HeadResult(Brief):
    """The last position's greedy token, its logit and natural log-probability (of "rows" the last of them); and the
    logits that were asked for, float32 [V], [T, V] or (rows) [S, V], or None."""

    token: int
    logit: float
    logprob: float
    logits: Float32Array | None


@dataclass(frozen=True, repr=False)
class Ranks(Brief):
    """What Targets asked for.

    logprobs: natural log-probabilities, float32 [S], NaN where a logit is. top_tokens: the likeliest tokens, int32 [S,
    top], of equals the lowest ids first; top_logprobs: theirs, float32 [S, top].
    """

    logprobs: Float32Array
    top_tokens: Int32Array
    top_logprobs: Float32Array


@dataclass(frozen=True, repr=False)
class Vectors(Brief):
    """A vector of each of a batch's segments, float32 [segments, H]: the final norm's outputs, pooled."""

    values: Float32Array


# Of a batch that no logits were computed of.
NO_RESULT = HeadResult(-1, 0.0, 0.0, None)

# Waits for what the head of a batch computes. It must be called before the next batch but one is run.
PendingHead: TypeAlias = Callable[[], HeadResult | Ranks | Vectors]


_Kind = TypeVar("_Kind", bound="LayerState")


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps of a sequence so that the sequence can be continued: one subclass for each kind.

    A family declares its layers' (`Family.layer_states`); a backend stores them, in a cache or for a batch only.
    """

    @property
    def parts(self) -> tuple[LayerState, ...]:
        """The states of one kind each that this is made of."""
        return (self,)

    def part(self, kind: type[_Kind]) -> _Kind | None:
        """The one of that kind, if any."""
        return next((part for part in self.parts if isinstance(part, kind)), None)


@dataclass(frozen=True)
class Several(LayerState):
    """States of several kinds, of a layer that mixes tokens in several ways; or none, of one that mixes none."""

    states: tuple[LayerState, ...] = ()

    @property
    def parts(self) -> tuple[LayerState, ...]:
        return self.states


@dataclass(frozen=True)
class KeysValues(LayerState):
    """A row of keys and a row of values for each token, `heads` x `head_dim` values each.

    window: a query sees that many tokens at most, itself the last; None where it sees all.
    """

    heads: int
    head_dim: int
    window: int | None = None

    @property
    def width(self) -> int:
        """Values of one token's keys."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Latent(LayerState):
    """A row for each token, of which every head's key and value are made (multi-head latent attention): `rank` values,
    and `rotary` values that stand in each head's key as they are."""

    rank: int
    rotary: int


@dataclass(frozen=True)
class SharedKeysValues(LayerState):
    """Nothing of its own: the layer sees the keys and values of an earlier one, number `layer`."""

    layer: int


@dataclass(frozen=True)
class Recurrent(LayerState):
    """The state of a linear recurrence: a matrix [key_dim, value_dim] for each of `heads`, whatever the sequence's
    length; and of the convolution before it the last `taps` rows of `channels` values. There are no matrices where a
    layer is a convolution only. rates: of how many more values of a token its steps are made."""

    heads: int
    key_dim: int
    value_dim: int
    channels: int
    taps: int
    rates: int = 0

    @property
    def matrix_values(self) -> int:
        """Values of all its matrices."""
        return self.heads * self.key_dim * self.value_dim
