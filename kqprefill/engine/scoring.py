"""Log-probabilities of many sequences: what a record asks for, and batches of them without padding.

A batch holds whole sequences one after another, each of which sees itself alone; choices that continue one prompt share
its computation. A record's figures do not depend on what it was packed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
import math
from typing import Any, TypeAlias, cast

import numpy as np

from ..core import (
    KEYS_PER_TOKEN,
    LARGEST_KEY_BLOCK,
    Batch,
    Brief,
    Float32Array,
    Int32Array,
    PendingHead,
    Ranks,
    Segment,
    Targets,
)
from ..errors import InputError

PROMPTS = "tokens", "prompt", "messages"  # keys of a record, of which it has one
# What `Model.score` takes: token ids, or what a line of `kqprefill score`'s input holds.
Record: TypeAlias = Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Item(Brief):
    """What a record asks for, in token ids.

    Without continuations the prompt's tokens but the first are scored; else those of each continuation are, given the
    prompt. choices: whether there are to be as many results as continuations, even one.
    """

    prompt: list[int]
    continuations: list[list[int]] | None = None
    choices: bool = False

    @property
    def sequences(self) -> list[list[int]]:
        """The whole sequences, as one would run them."""
        return [self.prompt] if self.continuations is None else [self.prompt + c for c in self.continuations]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.continuations or [[]]))

    def pieces(self, batch_tokens: int) -> list[Item]:
        """The item as Items that fit a batch of about that many tokens, each with some of the continuations."""
        if self.continuations is None or fits(self.tokens, self.keys, batch_tokens):
            return [self]
        pieces = []
        part: list[list[int]] = []
        for continuation in self.continuations:
            larger = Item(self.prompt, [*part, continuation], self.choices)
            if part and not fits(larger.tokens, larger.keys, batch_tokens):
                pieces.append(Item(self.prompt, part, self.choices))
                part = []
            part = [*part, continuation]
        return [*pieces, Item(self.prompt, part, self.choices)]

    @property
    def tokens(self) -> int:
        """Tokens that it takes of a batch, at most."""
        return len(self.prompt) + sum(map(len, self.continuations or ()))

    @property
    def keys(self) -> int:
        """Rows of keys that its attention takes, at most: each continuation may copy some of its prompt's."""
        return self.tokens + len(self.continuations or ()) * min(LARGEST_KEY_BLOCK, len(self.prompt))


@dataclass(frozen=True, repr=False)
class Scored:
    """One stretch of scored tokens: their ids and natural log-probabilities, int32 and float32 [n]; and the likeliest
    tokens at each place, int32 [n, top], with theirs, float32 [n, top]."""

    tokens: Int32Array
    logprobs: Float32Array
    top_tokens: Int32Array
    top_logprobs: Float32Array

    def __repr__(self) -> str:
        each = f", top {self.top_tokens.shape[1]} of each" if self.top_tokens.shape[1] else ""
        perplexity = "None" if self.perplexity is None else f"{self.perplexity:.6g}"
        return f"Scored(n_tokens={self.n_tokens}, logprob={self.logprob:.6g}, perplexity={perplexity}{each})"

    @property
    def n_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.tokens)

    @property
    def finite(self) -> bool:
        """Whether all log-probabilities are; they are not where the model's logits were not."""
        return bool(np.isfinite(self.logprobs).all() and np.isfinite(self.top_logprobs).all())

    @property
    def logprob(self) -> float:
        """Of all of them together: the sum. Where the model's logits were not finite, neither is this."""
        with np.errstate(invalid="ignore"):
            return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean_logprob(self) -> float | None:
        """A token's, in the mean; None where there is none."""
        return self.logprob / self.n_tokens if self.n_tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(-mean_logprob); inf where that is beyond a float's range."""
        mean = self.mean_logprob
        if mean is None:
            return None
        try:
            return math.exp(-mean)
        except OverflowError:
            return math.inf


# encoder(messages, generation): the function that gives a conversation's ids, with a text after it. generation: whether
# the conversation ends with the beginning of an answer.
ChatEncoder: TypeAlias = Callable[[Any, bool], Callable[[str], list[int]]]


def item_of(
    record: Record,
    check: Callable[[Any], list[int]],
    encode: Callable[[str], list[int]],
    chat_encoder: ChatEncoder,
) -> Item:
    """The Item that a record (token ids, or a mapping as a line of `kqprefill score`'s input) asks for.

    check(ids): the ids, valid ones, as a list; encode(text): a text's ids. Raises InputError.
    """
    if not isinstance(record, Mapping):
        return _whole(check(record))
    if sum(key in record for key in PROMPTS) != 1:
        raise InputError('give either "tokens" or "prompt" or "messages"')
    if "completion" in record and "choices" in record:
        raise InputError('give either "completion" or "choices"')
    key = next(key for key in PROMPTS if key in record)
    prompt, more = record[key], None
    if key == "prompt" and not isinstance(prompt, str):
        raise InputError('"prompt" must be a text')
    if "completion" in record:
        more = [record["completion"]]
    elif "choices" in record:
        more = record["choices"]
        if not isinstance(more, list) or not more:
            raise InputError('"choices" must be a list of at least one')
    if more is not None:
        if not all(isinstance(m, list if key == "tokens" else str) for m in more):
            asked, kind = "choices" if "choices" in record else "completion", "token ids" if key == "tokens" else "text"
            raise InputError(f'"{asked}" must be {kind}, as "{key}" is')
        if not all(more):
            raise InputError("a completion is empty")
    if key == "tokens":
        return (
            _whole(check(prompt))
            if more is None
            else Item(check(prompt), [check(m) for m in more], "choices" in record)
        )
    after = chat_encoder(prompt, more is not None) if key == "messages" else lambda m: encode(prompt + m)
    if more is None:
        return _whole(after(""))
    # A completion's tokens begin where its text's tokens, with the prompt before it, depart from those of the prompt
    # alone (a token may span both); of several choices where the first does, so that all are judged over the same
    # stretch.
    alone, texts = after(""), [after(m) for m in more]
    shared = min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids))) for ids in texts)
    if any(shared == len(ids) for ids in texts):
        raise InputError("a completion adds no token to the prompt")
    return Item(alone[:shared], [ids[shared:] for ids in texts], "choices" in record)


def _whole(ids: list[int]) -> Item:
    if not ids:
        raise InputError("the prompt is empty")
    return Item(ids)


# What shares a batch: pieces of items, each with whether it is its item's last.
Group: TypeAlias = list[tuple[Item, bool]]


def fits(tokens: int, keys: int, batch_tokens: int) -> bool:
    """Whether a batch of so many tokens has the memory for these, and for so many rows of keys."""
    return tokens <= batch_tokens and keys <= KEYS_PER_TOKEN * batch_tokens


# For each item of a batch, for each of its results, the slice of the batch's targets that it is.
Places: TypeAlias = list[list[slice]]


def packed(items: Sequence[Item], top: int) -> tuple[Batch, Places]:
    """Items as one batch.

    What a sequence's last token would predict is not asked, so it is left out: choices of one token take no more than
    their prompt. top: how many likeliest tokens to name at each place.
    """
    tokens: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    targets: list[int] = []

    def add(ids: list[int], position: int = 0, after: int | None = None) -> int:
        """Ids as a segment; the first one's row."""
        first = len(tokens)
        tokens.extend(ids)
        if ids:
            segments.append(Segment(first, len(ids), position, after))
        return first

    def ask(row_numbers: Iterable[int], ids: list[int]) -> slice:
        """Have ids scored, each after its row."""
        begin = len(rows)
        rows.extend(row_numbers)
        targets.extend(ids)
        return slice(begin, len(rows))

    places = []
    for item in items:
        prompt, results = item.prompt, []
        if item.continuations is None or len(item.continuations) == 1 or not prompt:
            for ids in item.sequences:
                known = max(1, len(prompt) if item.continuations is not None else 1)
                first = add(ids[:-1])
                results.append(ask(range(first + known - 1, first + len(ids) - 1), ids[known:]))
        else:
            shared = len(segments)
            last = add(prompt) + len(prompt) - 1
            for ids in item.continuations:
                first = add(ids[:-1], len(prompt), shared)
                results.append(ask([last, *range(first, first + len(ids) - 1)], ids))
        places.append(results)
    ids32, rows32, targets32 = (np.array(values, np.int32) for values in (tokens, rows, targets))
    return Batch(ids32, segments=tuple(segments), targets=Targets(rows32, targets32, top)), places


def results(batch: Batch, places: Places, ranks: Ranks) -> list[list[Scored]]:
    """A Scored of each continuation of each item."""
    targets = batch.targets
    assert targets is not None
    return [
        [Scored(targets.tokens[at], ranks.logprobs[at], ranks.top_tokens[at], ranks.top_logprobs[at]) for at in slices]
        for slices in places
    ]


def no_ranks(top: int) -> PendingHead:
    """What waits for a batch without targets."""
    ranks = Ranks(np.empty(0, np.float32), np.empty((0, top), np.int32), np.empty((0, top), np.float32))
    return lambda: ranks


@dataclass(frozen=True)
class Running:
    """A batch that has been started: pieces of items, and what waits for its ranks."""

    group: Group
    batch: Batch
    places: Places
    pending: PendingHead

    def finish(self, partial: list[Scored]) -> Iterator[Scored | list[Scored]]:
        """Wait, and give the results of the items that are complete; partial: of the one that is not, so far."""
        ranks = cast(Ranks, self.pending())
        for (piece, last), scored in zip(self.group, results(self.batch, self.places, ranks)):
            partial += scored
            if last:
                yield list(partial) if piece.choices else partial[0]
                partial.clear()
