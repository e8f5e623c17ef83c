"""Log-probabilities of many sequences: what a record asks for, and packing into batches without padding.

A batch holds whole sequences one after another, each of which sees itself alone; choices that continue one prompt share its
computation. A record's figures do not depend on what it was packed with.
"""

from dataclasses import dataclass
from itertools import takewhile
import math

import numpy as np

from ..backends.base import Batch, Ranks, Segment, Targets
from ..errors import InputError

BATCH_TOKENS = 8192  # a GPU's matrix units are busy from about 1000 on
_TAIL = 128  # keys at most that a backend copies for each choice (kqprefill.backends.cuda.packing)
_KINDS = "tokens", "prompt", "completion", "choices"  # what a record may ask with


@dataclass(frozen=True)
class Item:
    """Token ids (lists): a prompt, whose tokens but the first are scored where continuations is None; else those of each
    continuation are, given the prompt. choices: whether there are to be as many results as continuations, even one."""

    prompt: list
    continuations: list | None = None
    choices: bool = False

    @property
    def sequences(self):
        """The whole sequences, as one would run them."""
        return [self.prompt] if self.continuations is None else [self.prompt + c for c in self.continuations]

    @property
    def longest(self):
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.continuations or [()]))

    def pieces(self, batch_tokens):
        """The item as Items of about that many tokens at most, each with some of the continuations."""
        if self.continuations is None or self.tokens <= batch_tokens:
            return [self]
        parts, room = [[]], 0
        for continuation in self.continuations:
            if parts[-1] and len(continuation) > room:
                parts.append([])
            if not parts[-1]:
                room = batch_tokens - len(self.prompt)
            parts[-1].append(continuation)
            room -= len(continuation)
        return [Item(self.prompt, part, self.choices) for part in parts]

    @property
    def tokens(self):
        """In a batch, at most."""
        return len(self.prompt) + sum(map(len, self.continuations or ()))

    @property
    def keys(self):
        """Rows of keys that its attention takes, at most."""
        return self.tokens + len(self.continuations or ()) * min(_TAIL, len(self.prompt))


@dataclass(frozen=True)
class Scored:
    """What was found of one stretch of tokens: their ids and natural log-probabilities, int32 and float32 [n]; and the likeliest
    tokens at each place, int32 [n, top], with theirs, float32 [n, top]."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray

    @property
    def n_tokens(self):
        return len(self.tokens)

    @property
    def logprob(self):
        """Of all of them together: the sum."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean_logprob(self):
        """A token's, in the mean; None where there is none."""
        return self.logprob / self.n_tokens if self.n_tokens else None

    @property
    def perplexity(self):
        """exp(-mean_logprob); inf where that is beyond a float's range."""
        if not self.n_tokens:
            return None
        try:
            return math.exp(-self.mean_logprob)
        except OverflowError:
            return math.inf


def item_of(record, check, encode):
    """The Item that a record (token ids, or a mapping as a line of `kqprefill score`'s input) asks for.

    check(ids): the ids, valid ones, as a list; encode(text): a text's ids. Raises InputError.
    """
    if not isinstance(record, dict):
        return _whole(check(record))
    if ("tokens" in record) == ("prompt" in record):
        raise InputError('give either "tokens" or "prompt"')
    if "completion" in record and "choices" in record:
        raise InputError('give either "completion" or "choices"')
    key = "tokens" if "tokens" in record else "prompt"
    prompt, more = record[key], None
    if key == "prompt" and not isinstance(prompt, str):
        raise InputError('"prompt" must be a text')
    if "completion" in record:
        more = [record["completion"]]
    elif "choices" in record:
        more = record["choices"]
        if not isinstance(more, list) or not more:
            raise InputError('"choices" must be a list of at least one')
    if more is None:
        return _whole(encode(prompt) if key == "prompt" else check(prompt))
    if not all(isinstance(m, str) if key == "prompt" else isinstance(m, list) for m in more):
        raise InputError(
            f'"{"choices" if "choices" in record else "completion"}" must be {"text" if key == "prompt" else "token ids"}, as "{key}" is'
        )
    if not all(more):
        raise InputError("a completion is empty")
    if key == "tokens":
        return Item(check(prompt), [check(m) for m in more], "choices" in record)
    # A completion's tokens begin where its text's tokens, with the prompt before it, depart from those of the prompt alone (a
    # token may span both); of several choices where the first does, so that all are judged over the same stretch.
    alone, texts = encode(prompt), [encode(prompt + m) for m in more]
    shared = min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids))) for ids in texts)
    if any(shared == len(ids) for ids in texts):
        raise InputError("a completion adds no token to the prompt")
    return Item(alone[:shared], [ids[shared:] for ids in texts], "choices" in record)


def _whole(ids):
    if not ids:
        raise InputError("the prompt is empty")
    return Item(ids)


def groups(items, batch_tokens):
    """Lists of (piece of an item, whether it is the last), each for one batch; and None wherever items gives None, when all
    that came before it has been given."""
    group, tokens, keys = [], 0, 0
    for item in items:
        pieces = [] if item is None else item.pieces(batch_tokens)
        for piece in pieces:
            if group and (tokens + piece.tokens > batch_tokens or keys + piece.keys > 2 * batch_tokens):
                yield group
                group, tokens, keys = [], 0, 0
            group.append((piece, piece is pieces[-1]))
            tokens, keys = tokens + piece.tokens, keys + piece.keys
        if item is None:
            if group:
                yield group
                group, tokens, keys = [], 0, 0
            yield None
    if group:
        yield group


def lay_out(items, top):
    """(Batch, [the slices of its targets that are each item's results]). What a sequence's last token would predict is not
    asked, so it is left out: choices of one token take no more than their prompt."""
    tokens, segments, rows, targets, places = [], [], [], [], []

    def add(ids, position=0, after=None):
        first = len(tokens)
        tokens.extend(ids)
        if ids:
            segments.append(Segment(first, len(ids), position, after))
        return first

    def ask(row_numbers, ids):
        begin = len(rows)
        rows.extend(row_numbers)
        targets.extend(ids)
        return slice(begin, len(rows))

    for item in items:
        prompt, found = item.prompt, []
        if item.continuations is None or len(item.continuations) == 1 or not prompt:
            for ids in item.sequences:
                known = max(1, len(prompt) if item.continuations is not None else 1)
                first = add(ids[:-1])
                found.append(ask(range(first + known - 1, first + len(ids) - 1), ids[known:]))
        else:
            shared = len(segments)
            last = add(prompt) + len(prompt) - 1
            for ids in item.continuations:
                first = add(ids[:-1], len(prompt), shared)
                found.append(ask([last, *range(first, first + len(ids) - 1)], ids))
        places.append(found)
    arrays = (np.array(values, np.int32) for values in (tokens, rows, targets))
    ids, rows, targets = arrays
    return Batch(ids, segments=tuple(segments), targets=Targets(rows, targets, top)), places


def results(batch, places, ranks):
    """[[Scored of each continuation] of each item]."""
    return [
        [
            Scored(batch.targets.tokens[at], ranks.logprobs[at], ranks.top_tokens[at], ranks.top_logprobs[at])
            for at in found
        ]
        for found in places
    ]


def no_ranks(top):
    """Of a batch without targets."""
    return Ranks(np.empty(0, np.float32), np.empty((0, top), np.int32), np.empty((0, top), np.float32))
