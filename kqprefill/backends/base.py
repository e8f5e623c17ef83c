"""What a backend is: it runs a family's layers over batches, and stores what sequences leave behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..collector import Collector
from ..core import BATCH_TOKENS, FIRST_TOKENS, Batch, Float32Array, Logits, PendingHead, Progress, no_progress
from ..errors import InputError
from ..models.family import Family
from ..models.precision import Precision
from ..timeline import Stage
from .budget import Budget

Started = TypeVar("Started")  # a batch that runs, as whoever has started it knows it


class Cache(ABC):
    """The layers' states of one sequence of `length` tokens, with room for `capacity`.

    tokens: their ids. broken: whether a prompt has failed after it had changed the states of recurrent layers, which
    cannot be taken back.
    """

    broken = False

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.tokens: list[int] = []

    def __repr__(self) -> str:
        return f"<Cache: {self.length} tokens, room for {self.capacity}>"

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self.tokens.clear()
        self.broken = False

    def check(self) -> None:
        """Raise InputError for a broken cache."""
        if self.broken:
            raise InputError("the cache's last prompt failed, and its recurrent states cannot be taken back: reset it")

    @abstractmethod
    def close(self) -> None:
        """Free the storage."""


# Hears of rows of a layer's state, of tokens from the number on: take(number, rows). Entering `rows` waits until they
# are there and gives their two arrays [n, ...], float32, or float16 and finite, which are the caller's until it leaves.
# Any thread may enter, and somebody must.
TakeRows: TypeAlias = Callable[[int, AbstractContextManager[tuple[NDArray[Any], NDArray[Any]]]], None]


class StateAccess(ABC):
    """The layers' states in a cache as real values, whatever form a backend keeps them in.

    Of a KeysValues layer: keys and values [n, heads, head_dim] each; of a Latent: [n, rank] and [n, rotary]; of a
    Recurrent, after the last token: its matrices [heads, key_dim, value_dim] and the last rows [taps, channels] of the
    convolution's inputs.
    """

    @abstractmethod
    def rows(self, layer: int, end: int, wide: bool, take: TakeRows, live: bool = False) -> Callable[[], None]:
        """Begin to read the rows of tokens 0 to end - 1. Returns what has `take` hear of them, in pieces, as soon as
        they are on their way: to be called once, perhaps in another thread, as it may wait for pieces to be taken.

        wide: float32, else perhaps float16, which entering the rows raises InputError for where it cannot hold one.
        live: while a batch runs, just after the layer has been started; else between batches.
        """

    @abstractmethod
    def recurrence(self, layer: int) -> tuple[Float32Array, Float32Array]:
        """A recurrence's state, between batches."""

    @abstractmethod
    def write(self, layer: int, begin: int, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Make these two arrays, float32 or float16, the layer's rows of tokens from `begin` on; between batches, and
        from several threads. Raises StateError for values that the model cannot have made."""

    @abstractmethod
    def write_recurrence(self, layer: int, matrices: Float32Array, rows: Float32Array) -> None:
        """Make these the layer's recurrence's state, between batches."""

    def close(self) -> None:
        """Free what the access itself holds."""

    def __enter__(self) -> StateAccess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def whole_rows(access: StateAccess, layer: int, end: int) -> tuple[Float32Array, Float32Array]:
    """A layer's rows of tokens 0 to end - 1, between batches, in one piece."""
    pieces: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def take(first: int, rows: AbstractContextManager[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        with rows as (a, b):
            pieces.append((a.astype(np.float32), b.astype(np.float32)))

    access.rows(layer, end, True, take)()
    return np.concatenate([a for a, _ in pieces]), np.concatenate([b for _, b in pieces])


@dataclass(frozen=True)
class Loaded:
    """How long the weights that stay on the device took to get there."""

    nbytes: int
    seconds: float


@dataclass(frozen=True)
class BatchSize:
    """Tokens of a batch to score, at most, and of the first one; each after it may be twice as large as the one before.
    why: the reason, for people, where it is not the usual size."""

    tokens: int = BATCH_TOKENS
    first: int = FIRST_TOKENS
    why: str = ""


class Backend(ABC):
    """A device that can run a model.

    name: "cpu" or "cuda". device_name: for people. ahead: how many batches may be started before the first of them is
    waited for; 0 where `run` returns once the batch is computed. tells_layers: whether `run`'s progress hears of each
    layer, in order, just after it has been started.
    """

    name: str = ""
    device_name: str = ""
    ahead: int = 0
    tells_layers: bool = True

    @property
    def plans(self) -> Sequence[Any]:
        """What of the model stays in each device's memory (kqprefill.backends.cuda.weights.plan.Plan); none where that
        means nothing."""
        return ()

    @property
    def report(self) -> Sequence[str]:
        """What the devices have done so far, a line each, where there are several."""
        return ()

    @property
    def loaded(self) -> Loaded | None:
        """The last upload of weights that stay on the device, None where there was none."""
        return None

    @abstractmethod
    def load(
        self,
        family: Family,
        progress: Progress,
        vram: Budget | None = None,
        tokens: int | None = None,
        ranks: bool = False,
        precision: Precision = "exact",
    ) -> None:
        """Make the family's weights ready (a no-op on the CPU); progress hears how far it is.

        vram: device memory that may be taken, None for all that is free. tokens: of the longest prompt, or (ranks) of
        the largest batch with targets, to plan for; None where the backend is to choose. precision: what matrices are
        multiplied as. Raises BackendError where the model cannot run within it, or the backend not so.
        """

    def batch_size(
        self, family: Family, tokens: int | None = None, top: int = 0, progress: Progress = no_progress
    ) -> BatchSize:
        """How large the batches that score a loaded model are to be.

        tokens: where the caller has said it. top: how many likeliest tokens are to be named at each place. progress
        hears of what a backend does to make room for them. Raises BackendError.
        """
        return BatchSize() if tokens is None else BatchSize(tokens)

    def take_least(self) -> None:
        """Take only device memory, from now on, that a loaded model does not run without."""

    def in_turn(self, started: Iterable[Started | None]) -> Iterator[Started]:
        """Batches in the order in which an iterable starts them, each to be waited for when it comes out.

        One comes out once `ahead` more have been started. None among them has what was started before come out without
        waiting for another.
        """
        running: deque[Started] = deque()
        for batch in started:
            if batch is not None:
                running.append(batch)
            while len(running) > (0 if batch is None else self.ahead):
                yield running.popleft()
        yield from running

    @abstractmethod
    def new_cache(self, family: Family, capacity: int) -> Cache:
        """A Cache for `capacity` tokens."""

    @abstractmethod
    def state_access(self, family: Family, cache: Cache, writing: bool = False) -> StateAccess:
        """The states in a cache of `new_cache`; writing: an empty one, which states will be written to."""

    @abstractmethod
    def new_collector(self, family: Family, output: bool, progress: Progress = no_progress) -> Collector:
        """A Collector for batches of the loaded family; output: whether it wants the output matrix's inputs, too.

        progress hears of what a backend does to make room for the sums. Raises BackendError where there is none.
        """

    @abstractmethod
    def run(
        self,
        family: Family,
        batch: Batch,
        cache: Cache | None,
        logits: Logits,
        progress: Progress,
        timed: bool = False,
        collector: Collector | None = None,
    ) -> tuple[PendingHead, dict[str, Stage] | None]:
        """Run one batch through the family's layers (`Family.forward`) and its head, asked for `logits`; or, where a
        collector of this backend's is to hear the inputs of products, through the layers alone.

        Returns what the head gives, and {name: Stage} if timed, else None. progress hears of each layer, and of what a
        backend does before (compiling).
        """

    def floors(self, family: Family) -> list[tuple[str, Callable[[int], float]]]:
        """[(what, function of a prompt's tokens)]: seconds that a prompt takes at least, as far as known."""
        return []

    def memory_used(self) -> int | None:
        """Bytes of device memory held, or None where that means nothing."""
        return None

    def close(self) -> None:
        """Free everything."""
