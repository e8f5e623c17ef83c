"""Which layers each of several devices runs, and how a pipeline of them goes: work flows through the devices one after
another, batches of records or chunks of one long prompt, each of which is on one device at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
import math

from ....core import Logits
from ....errors import BackendError
from ...budget import gib
from ..bounds import Operations, Speed, head_operations, mixers
from ..kv_cache import state_bytes
from ..rehearsal import planned_batch, rehearse
from ..weights.matrix import layer_matrices, tile_bytes
from ..weights.plan import CONTEXT_BYTES
from ..weights.share import Share

LEAST_CHUNK, MOST_CHUNK = 1024, 8192  # tokens of a long prompt that are on one device at a time
_CHUNKS = 8  # for each device, so that the first and the last ones' waiting is a small part
_SLACK = 0.03  # of a device's memory that is not counted on


def chunk_tokens(tokens: int, devices: int) -> int:
    """How long the chunks are in which one prompt of so many tokens flows through so many devices. Each begins at a
    multiple of LEAST_CHUNK tokens of the prompt, as the chunks of recurrences and the tiles of attention do."""
    share = math.ceil(tokens / (_CHUNKS * devices * LEAST_CHUNK))
    return min(MOST_CHUNK, max(1, share) * LEAST_CHUNK)


@dataclass(frozen=True)
class Device:
    """One of the devices that layers are split over: how fast it is, bytes that may be taken on it."""

    speed: Speed
    budget: int


class _Costs:
    """What runs of layers take, of prompts of so many tokens or (ranks) batches with as many targets."""

    def __init__(self, devices: Sequence[Device], tokens: int, work_bytes: int, ranks: bool) -> None:
        self._devices, self._tokens, self._work, self._ranks = devices, tokens, work_bytes, ranks
        self._family, self._precision = devices[0].speed.family, devices[0].speed.precision
        self.count = len(self._family.blocks)

    @staticmethod
    def _sums(values: Iterable[float]) -> list[float]:
        """Of none of the values, of the first, of the first two, …"""
        return list(accumulate(values, initial=0.0))

    @cached_property
    def _matrices(self) -> list[float]:
        """Operations of the layers' products with matrices, summed up."""
        experts, done = self._family.experts, []
        for block in self._family.blocks:
            own = 0.0
            for weight in block:
                if weight.is_matrix:
                    used = experts.used / experts.count if experts is not None and len(weight.shape) > 2 else 1.0
                    own += 2 * used * math.prod(weight.shape) * self._tokens
            done.append(own)
        return self._sums(done)

    @cached_property
    def _mixers(self) -> tuple[list[float], list[float]]:
        both = [mixers(self._family, index, self._tokens, self._ranks) for index in range(self.count)]
        return self._sums([attention for attention, _ in both]), self._sums([other for _, other in both])

    @cached_property
    def _tiles(self) -> list[float]:
        return self._sums([tile_bytes(tensors, self._precision) for tensors in layer_matrices(self._family)])

    @cached_property
    def _states(self) -> list[float]:
        """Bytes of the states that are kept of one long prompt."""
        kept = 0 if self._ranks else self._tokens
        return self._sums([state_bytes(state, kept) for state in self._family.layer_states])

    def seconds(self, number: int, first: int, last: int) -> float:
        """About what the device of that number takes for the layers from `first` to before `last`."""
        speed, share = self._devices[number].speed, Share(range(first, last), self.count)
        matrices, attention, others = (sums[last] - sums[first] for sums in (self._matrices, *self._mixers))
        head = head_operations(self._family, self._tokens) if self._ranks and share.is_last else 0.0
        computing = speed.with_head(Operations(matrices, attention, others, head))
        beyond = self._needed(share) - self._devices[number].budget * (1 - _SLACK)
        return computing if beyond <= 0 else max(computing + speed.unpacking(beyond), beyond / speed.bus_rate)

    def _needed(self, share: Share) -> float:
        """Bytes that the share takes on a device with all of its layers resident."""
        first, last = share.layers.start, share.layers.stop
        embedding = [self._family.token_embd.tensor] if share.holds_embedding(self._family) else []
        own = self._tiles[last] - self._tiles[first] + self._states[last] - self._states[first]
        return CONTEXT_BYTES + self._work + own + tile_bytes([*share.outside(self._family), *embedding])


def split(devices: Sequence[Device], tokens: int, at_once: int, ranks: bool = False) -> list[Share]:
    """A Share of their model for each device, in order, such that the slowest takes as little time as can be.

    tokens: of the longest prompt, or (ranks) of a batch with as many targets, which have the logits computed at each.
    at_once: how many of them a device computes at a time. A device whose layers do not all fit streams some, which
    takes it the longer; so layers go where there is room as long as that is faster. Raises BackendError where there are
    more devices than places to part the model at.
    """
    speed = devices[0].speed
    family, batch = speed.family, planned_batch(at_once, ranks)
    logits: Logits = "ranks" if ranks else None
    needs = rehearse(family, speed.facts, speed.kernel_set, batch, logits, precision=speed.precision)
    count, costs = len(family.blocks), _Costs(devices, tokens, needs.work_bytes, ranks)
    parts = [0, *(index for index in range(1, count) if family.may_part(index)), count]
    most = len(parts) - 1
    if len(devices) > most:
        raise BackendError(
            f"{family.file.path}: its {count} layers can be split over at most {most} devices, not {len(devices)}"
        )
    # best[i]: of the devices so far, over the layers before parts[i]: the slowest one's seconds, and where each begins.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for number in range(len(devices)):
        remaining, reached = len(devices) - number - 1, {}
        ends = range(number + 1, len(parts) - remaining) if remaining else [most]
        for end in ends:
            found = (
                (max(slowest, costs.seconds(number, parts[begin], parts[end])), [*starts, begin])
                for begin, (slowest, starts) in best.items()
                if begin < end
            )
            reached[end] = min(found, key=lambda one: one[0])
        best = reached
    _, starts = best[most]
    places = [*(parts[start] for start in starts), count]
    return [Share(range(begin, end), count) for begin, end in pairwise(places)]


@dataclass(frozen=True)
class Flow:
    """How one kind of work flows through the devices: so many pieces of `tokens` each, in the mean, seconds that each
    of the devices takes for one of them."""

    pieces: int
    tokens: float
    seconds: tuple[float, ...]

    @property
    def all_seconds(self) -> float:
        """From the first piece's start to the last one's end: the slowest device sets the pace."""
        return sum(self.seconds) + (self.pieces - 1) * max(self.seconds)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.pieces * self.tokens / self.all_seconds

    @property
    def bubble(self) -> float:
        """What part of the devices' time they wait for one another."""
        return 1 - self.pieces * sum(self.seconds) / (len(self.seconds) * self.all_seconds)


def shared_budget(nbytes: int, times: int) -> int:
    """Bytes for each of so many shares on one device. Raises BackendError where that is nothing."""
    if nbytes // times <= CONTEXT_BYTES:
        raise BackendError(f"{gib(nbytes)} of GPU memory are too little for {times} shares of a model")
    return nbytes // times
