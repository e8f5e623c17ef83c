"""How fast replicas are, and which of them lag: what people are told of a run over a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
import time

from ..corpus.inputs import Block
from ..corpus.scorer import Done

_LATE = 3.0  # times what is usual, from which on a block is late
_LEAST_LATE = 10.0  # seconds: less is nothing to tell people of
_SLOW = 0.5  # of the median rate, below which a replica is slow
_KNOWN = 3  # blocks after which it is known what is usual
_MINUTE = 60.0  # seconds from one line to the next
_NAMED = 3  # replicas of a line, at most


@dataclass
class _Rate:
    name: str
    blocks: int = 0
    records: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Rates:
    """Of each replica what it has done in how many seconds. tell(line): hears of what is late, and how it goes."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._say = tell
        self._rates: dict[int, _Rate] = {}
        self._pace: list[float] = []  # seconds a byte of input, of blocks that are done
        self._told: set[tuple[int, str]] = set()
        self._begun = self._last = time.monotonic()

    def begin(self, replicas: int) -> None:
        """So many have been asked for."""
        self._rates = {number: _Rate(f"replica {number}") for number in range(replicas)}
        self._begun = self._last = time.monotonic()

    def name(self, number: int, name: str) -> None:
        """Where a replica is."""
        self._rates[number].name = name

    def add(self, number: int, block: Block, done: Done) -> None:
        """A replica has done a block."""
        own = self._rates[number]
        own.blocks, own.records = own.blocks + 1, own.records + done.records
        own.tokens, own.seconds = own.tokens + done.tokens, own.seconds + done.seconds
        self._pace.append(done.seconds / max(1, block.nbytes))

    def look(self, number: int, block: Block, since: float) -> None:
        """A replica has had a block since then: tell where that is too long."""
        if len(self._pace) < _KNOWN or (number, block.place) in self._told:
            return
        usual, took = median(self._pace) * block.nbytes, time.monotonic() - since
        if took > max(_LEAST_LATE, _LATE * usual):
            self._told.add((number, block.place))
            name = self._rates[number].name
            self._say(f"{name} is late: it has had {block.where} for {took:.0f} s; {usual:.0f} s are usual")

    def tell(self, waiting: int) -> None:
        """Tell how it goes, once a minute; waiting: replicas that are not there."""
        now = time.monotonic()
        if now - self._last < _MINUTE:
            return
        self._last = now
        working = [own for own in self._rates.values() if own.seconds]
        line = self.note(len(self._rates) - waiting)
        if working:
            slow = [own for own in sorted(working, key=lambda own: own.rate) if own.rate < _SLOW * self._median()]
            named = ", ".join(f"{own.name} {own.rate:.0f}" for own in slow[:_NAMED])
            line += f"; slow: {named}{', …' if len(slow) > _NAMED else ''}" if slow else ""
        if waiting:
            line += f"; {waiting} replicas wait for room or for their model"
        self._say(line)

    def note(self, there: int) -> str:
        """In a few words how fast all are; there: how many replicas can work."""
        records, tokens = (sum(getattr(own, name) for own in self._rates.values()) for name in ("records", "tokens"))
        rate = tokens / max(1e-9, time.monotonic() - self._begun)
        each = f", each {self._median():.0f}" if self._pace else ""
        return f"{records} records, {rate:.0f} tokens/s, {there} replicas{each}"

    def table(self) -> Iterator[str]:
        """A line for each replica."""
        for own in self._rates.values():
            slow = ", slow" if own.seconds and own.rate < _SLOW * self._median() else ""
            yield f"{own.name}: {own.blocks} blocks, {own.records} records, {own.rate:.0f} tokens/s{slow}"

    def _median(self) -> float:
        return median([own.rate for own in self._rates.values() if own.seconds] or [0.0])
