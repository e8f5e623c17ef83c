"""Which records share a batch: as many as fit, in order, but so that none is small without need.

A batch of few tokens takes the time of its launches, and of reading the weights, whatever their number. A small one is
therefore joined with the one before where a batch holds both; else the two are evened out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .scoring import Group, Item, fits


class _Load:
    """Pieces of items for one batch, and what they take of it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.tokens = sum(piece.tokens for piece, _ in group)
        self.keys = sum(piece.keys for piece, _ in group)

    def has_room(self, tokens: int, keys: int, batch_tokens: int) -> bool:
        """Whether a batch of so many tokens holds so much more; an empty one holds any piece."""
        return not self.group or fits(self.tokens + tokens, self.keys + keys, batch_tokens)

    def add(self, piece: Item, last: bool) -> None:
        """Take one more piece; last: whether it is its item's last."""
        self.group.append((piece, last))
        self.tokens, self.keys = self.tokens + piece.tokens, self.keys + piece.keys


def packs(items: Iterable[Item | None], batch_tokens: int, first_tokens: int | None = None) -> Iterator[Group | None]:
    """What each batch is made of; and None wherever items gives None, when all that came before it has been given.

    first_tokens: of the first batch, where fewer; each that follows may have twice as many as the one before. A full
    batch is given once the next one has half as many tokens; one that ends with fewer is evened out with it. There are
    never more batches than if each were filled.
    """
    limit = min(batch_tokens, first_tokens or batch_tokens)
    held, filling = _Load([]), _Load([])
    for item in items:
        pieces = [] if item is None else item.pieces(batch_tokens)
        for piece in pieces:
            if not filling.has_room(piece.tokens, piece.keys, limit):
                *ready, held = _evened(held, filling, batch_tokens)
                yield from (load.group for load in ready)
                filling, limit = _Load([]), min(batch_tokens, 2 * limit)
            filling.add(piece, piece is pieces[-1])
            if held.group and 2 * filling.tokens >= min(held.tokens, batch_tokens):
                yield held.group
                held = _Load([])
        if item is None:
            yield from (load.group for load in _evened(held, filling, batch_tokens))
            held, filling = _Load([]), _Load([])
            yield None
    yield from (load.group for load in _evened(held, filling, batch_tokens))


def _evened(held: _Load, small: _Load, batch_tokens: int) -> list[_Load]:
    """A batch and a smaller one after it, or nothing: as one where that holds both, else as the two whose larger one is
    smallest."""
    pieces, at = held.group + small.group, len(held.group)
    if held.has_room(small.tokens, small.keys, batch_tokens):
        return [_Load(pieces)] if pieces else []
    tokens, keys, all_tokens = small.tokens, small.keys, held.tokens + small.tokens
    for piece, _ in reversed(held.group):
        after, keys = tokens + piece.tokens, keys + piece.keys
        if after >= all_tokens - tokens or not fits(after, keys, batch_tokens):
            break
        tokens, at = after, at - 1
    return [_Load(pieces[:at]), _Load(pieces[at:])]
