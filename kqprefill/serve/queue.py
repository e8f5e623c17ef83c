"""What waits to be computed, and the engine that computes it: one thread with the model, which packs whatever waits
into its next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Condition
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import BATCH_TOKENS, Pooling
from ..engine.embedding import Normalise
from ..engine.scoring import Item, Scored
from ..errors import DAMAGED_WEIGHTS, BackendError, KqprefillError

if TYPE_CHECKING:
    from ..engine.model import Model


_LOOK_SECONDS = 0.5  # that the engine waits at a time


@dataclass(frozen=True)
class Kind:
    """What is asked of the model: vectors that are pooled and normalised so, or (no pooling) log-probabilities."""

    pooling: Pooling | None = None
    normalise: Normalise = "l2"


SCORES = Kind()


class Full(KqprefillError):
    """So many tokens wait already that a request's have no room. seconds: after which it may have."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} tokens wait already; try again in {seconds} s")
        self.seconds = seconds


class Work:
    """The prompts of one request, and what comes of them: results in their order, or an error.

    done() is called once, in the engine's thread, when either is there; it is not where the work is cancelled.
    """

    def __init__(self, kind: Kind, items: Sequence[Item], done: Callable[[], object]) -> None:
        self.kind, self.items, self._done = kind, items, done
        self.results: list[Any] = [None] * len(items)
        self.error: Exception | None = None
        self.cancelled = False
        self._left = len(items)

    @property
    def tokens(self) -> int:
        """Tokens of all its prompts."""
        return sum(item.tokens for item in self.items)

    def finish(self, index: int, result: Any) -> None:
        """Take one prompt's result."""
        self.results[index] = result
        self._left -= 1
        if not self._left and self.error is None and not self.cancelled:
            self._done()

    def fail(self, error: Exception) -> None:
        """Take an error in place of results; of several the first."""
        if self.error is None:
            self.error = error
            if not self.cancelled:
                self._done()


@dataclass(frozen=True)
class _Job:
    """One prompt of some work. number: the order in which they came."""

    work: Work
    index: int
    number: int

    @property
    def item(self) -> Item:
        return self.work.items[self.index]


def _computed_tokens(job: _Job) -> int:
    """Tokens that a job takes of its batch: what would come after a last one is not asked of scores."""
    item = job.item
    if job.work.kind.pooling is not None:
        return len(item.prompt)
    return item.tokens - (1 if item.continuations is None else len(item.continuations))


class Engine:
    """The model and what waits for it. `run` computes, in the thread that has opened the model; all else may be called
    from any thread.

    top: how many likeliest tokens are named at each place. failed: why the last batch was not computed, None where it
    was. prompts, tokens: how many have been computed; cancelled: prompts that were given up before they were.
    """

    def __init__(self, model: Model, top: int, batch_tokens: int | None, most_tokens: int) -> None:
        """most_tokens: that may wait, all told; a single request's may be more where nothing waits."""
        self._model, self._top, self._batch_tokens, self._most = model, top, batch_tokens, most_tokens
        self._changed = Condition()
        self._waiting: dict[Kind, deque[_Job]] = {}
        self._computing: deque[_Job] = deque()
        self._closing = False
        self._number = 0
        self._start, self._idle = time.monotonic(), 0.0
        self.waiting_tokens = self.prompts = self.tokens = self.cancelled = 0
        self.failed: str | None = None

    @property
    def waiting_prompts(self) -> int:
        """Prompts that wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def has_work(self) -> bool:
        """Whether something waits or is being computed."""
        with self._changed:
            return bool(self._computing) or any(self._waiting.values())

    @property
    def busy_seconds(self) -> float:
        """How long there was something to compute."""
        return time.monotonic() - self._start - self._idle

    def submit(self, work: Work) -> None:
        """Have work done after what waits. Raises Full, and BackendError once `close` has been called."""
        tokens = work.tokens
        with self._changed:
            if self._closing:
                raise BackendError("the server is ending")
            if self.waiting_tokens and self.waiting_tokens + tokens > self._most:
                rate = self.tokens / max(self.busy_seconds, 1e-3)
                seconds = self.waiting_tokens / rate if rate else 1.0
                raise Full(self.waiting_tokens, min(60, max(1, round(seconds))))
            jobs = self._waiting.setdefault(work.kind, deque())
            for index in range(len(work.items)):
                self._number += 1
                jobs.append(_Job(work, index, self._number))
            self.waiting_tokens += tokens
            self._changed.notify()

    def cancel(self, work: Work) -> None:
        """Take what waits of some work from the queue; what is being computed is thrown away when it is."""
        with self._changed:
            work.cancelled = True
            jobs = self._waiting.get(work.kind, deque())
            gone = [job for job in jobs if job.work is work]
            if gone:
                self._waiting[work.kind] = deque(job for job in jobs if job.work is not work)
                self.waiting_tokens -= sum(job.item.tokens for job in gone)
                self.cancelled += len(gone)

    def close(self) -> None:
        """Have `run` return when all that waits is computed."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        """Compute what comes, until `close`. An error fails the requests whose prompts were being computed."""
        while (kind := self._next_kind()) is not None:
            try:
                for result in self._results(kind):
                    self._finish(self._computing.popleft(), result)
            except Exception as error:
                self.failed = str(error)
                while self._computing:
                    self._computing.popleft().work.fail(error)

    def _finish(self, job: _Job, result: Any) -> None:
        self.failed = None
        self.prompts += 1
        self.tokens += _computed_tokens(job)
        scores = result if isinstance(result, list) else [result]
        sound = all(r.finite if isinstance(r, Scored) else bool(np.isfinite(r).all()) for r in scores)
        if sound:
            job.work.finish(job.index, result)
        else:
            job.work.fail(BackendError(f"what came out is not finite: {DAMAGED_WEIGHTS}"))

    def _next_kind(self) -> Kind | None:
        """The kind of what has waited longest; None where nothing does and nothing more will come."""
        with self._changed:
            while True:
                waiting = {kind: jobs[0].number for kind, jobs in self._waiting.items() if jobs}
                if waiting:
                    return min(waiting, key=lambda kind: waiting[kind])
                if self._closing:
                    return None
                self._wait()

    def _results(self, kind: Kind) -> Iterator[Any]:
        """What comes of the jobs of one kind, in the order in which `_feed` has given them."""
        items = self._feed(kind)
        if kind.pooling is None:
            return self._model.score(items, self._batch_tokens, self._top)
        prompts = (None if item is None else item.prompt for item in items)
        return self._model.embed(prompts, kind.pooling, kind.normalise, self._batch_tokens)

    def _feed(self, kind: Kind) -> Iterator[Item | None]:
        """The items of one kind as they come; None where no more wait, so that what was given is computed.

        It ends where only another kind waits, or where that has waited longer and a batch's tokens have been given.
        """
        given, flushed = 0, True
        while True:
            with self._changed:
                jobs = self._waiting.get(kind)
                job: _Job | None = None
                if jobs and not (given >= BATCH_TOKENS and self._another_is_older(kind, jobs[0].number)):
                    job = jobs.popleft()
                    self._computing.append(job)
                    self.waiting_tokens -= job.item.tokens
                    given += job.item.tokens
                elif flushed:
                    if self._closing or any(self._waiting.values()):
                        return
                    self._wait()
                    continue
            flushed = job is None
            yield None if job is None else job.item

    def _another_is_older(self, kind: Kind, number: int) -> bool:
        return any(jobs and jobs[0].number < number for other, jobs in self._waiting.items() if other != kind)

    def _wait(self) -> None:
        """Until something has changed, or for a while: a signal may be given to another thread, and its handler runs
        only when this one, the main thread, runs again."""
        begin = time.monotonic()
        self._changed.wait(_LOOK_SECONDS)
        self._idle += time.monotonic() - begin
