"""Several GPUs as one backend: each runs some of the layers, and work flows through them one after another.

Batches of records flow through as they are; one long prompt is cut into chunks, whose keys, values and states stay with
the layers. Only the residual stream goes from device to device (crossing.py). Results have the same bits as one
device's, since none depends on how a prompt is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from threading import Lock
from typing import Any, cast

import numpy as np

from ....collector import Collector
from ....core import BATCH_TOKENS, Batch, HeadResult, Logits, PendingHead, Progress, no_progress
from ....errors import BackendError
from ....models.family import Family
from ....models.precision import Precision
from ....timeline import Stage
from ...base import Backend, BatchSize, Cache, Loaded, StateAccess
from ...budget import Budget
from ..backend import PLANNED_TOKENS
from ..bounds import Speed
from ..device.arrays import DeviceArray
from ..device.gpu import cuda_errors
from ..ops.batch import ResidualBound
from ..weights.plan import Plan, budget_of
from .crossing import Crossing, Parcel
from .members import Member, PipelineCache, PipelineCollector, PipelineStates
from .split import Device, chunk_tokens, shared_budget, split


@dataclass(frozen=True)
class _Asked:
    """What is asked for of a batch: logits, as of Backend.run; whether there is a head at all, which all but the last
    of a prompt's chunks may do without; whether each stage is timed."""

    logits: Logits
    head: bool
    timed: bool


@dataclass(frozen=True)
class _Passed:
    """What a device has made of a batch: a parcel for the next, or the head's result; and the time by stage."""

    parcel: Parcel | None
    pending: PendingHead | None
    stages: dict[str, Stage] | None


class Pipeline(Backend):
    """Runs one model on several GPUs, or on one as if it were several. Raises BackendError where one cannot be used, or
    they are of different kinds."""

    name = "cuda"
    tells_layers = False

    def __init__(self, devices: Sequence[int], kernels: str = "auto") -> None:
        self.ahead = len(devices)
        self._members: list[Member] = []
        self._crossings: list[Crossing] = []
        self._own: PipelineCache | None = None  # of prompts that are cut, where the caller keeps no cache
        try:
            for device in devices:
                self._members.append(Member(device, kernels, self.ahead))
            self._refuse_unlike(devices)
            for one, other in zip(self._members, self._members[1:]):
                self._crossings.append(one.call(Crossing, one.backend.gpu, other.backend.gpu))
        except BaseException:
            self.close()
            raise
        names = groupby(member.backend.device_name for member in self._members)
        self.device_name = ", ".join(f"{len(list(own))} x {name}" for name, own in names)

    def _refuse_unlike(self, devices: Sequence[int]) -> None:
        """Results are to have the same bits wherever a layer runs: the devices must have the same kernels."""
        first, *others = (member.backend for member in self._members)
        for device, other in zip(devices[1:], others):
            if other.gpu.capability != first.gpu.capability:
                mine, its = ("{}.{}".format(*backend.gpu.capability) for backend in (first, other))
                raise BackendError(
                    f"device {device} ({other.device_name}) has compute capability {its}, device {devices[0]} "
                    f"({first.device_name}) {mine}: a model is split over devices of one kind"
                )

    @property
    def plans(self) -> Sequence[Plan]:
        return [plan for member in self._members for plan in member.backend.plans]

    @property
    def loaded(self) -> Loaded | None:
        own = [member.backend.loaded for member in self._members]
        known = [loaded for loaded in own if loaded is not None]
        return Loaded(sum(one.nbytes for one in known), max(one.seconds for one in known)) if known else None

    @property
    def report(self) -> Sequence[str]:
        lines = []
        for member, crossing in zip(self._members, [*self._crossings, None]):
            taken = member.call(member.laps.seconds)
            rate = f"{member.tokens / taken:.0f} tokens/s in {taken:.3f} s" if taken else "nothing yet"
            line = f"device {member.backend.gpu.index}, {member.backend.share}: {rate}"
            if crossing is not None and crossing.nbytes:
                how = "from peer to peer" if crossing.peer else "through host memory"
                line += f"; handed on {crossing.nbytes / 1e9:.2f} GB {how} in {crossing.seconds():.3f} s"
            lines.append(line)
        return lines

    def load(
        self,
        family: Family,
        progress: Progress,
        vram: Budget | None = None,
        tokens: int | None = None,
        ranks: bool = False,
        precision: Precision = "exact",
    ) -> None:
        budgets = self._budgets(vram)
        if not ranks:
            tokens = min(tokens or PLANNED_TOKENS, family.config.context_length)
        longest = tokens or BATCH_TOKENS
        at_once = longest if ranks or family.both_ways else min(longest, chunk_tokens(longest, len(self._members)))
        backends = [member.backend for member in self._members]
        speeds = [Speed(family, backend.gpu, backend.kernel_set, precision) for backend in backends]
        devices = [Device(speed, budget) for speed, budget in zip(speeds, budgets)]
        shares = split(devices, longest, at_once, ranks)
        heard = _Together(progress)
        planned = None if ranks and tokens is None else at_once
        loading = [
            member.submit(
                member.backend.load,
                family,
                heard.part(number),
                Budget.parse(str(budget)),
                planned,
                ranks,
                precision,
                share,
            )
            for number, (member, budget, share) in enumerate(zip(self._members, budgets, shares))
        ]
        wait(loading)
        for member, loaded in zip(self._members, loading):
            with member.named():
                loaded.result()

    def _budgets(self, vram: Budget | None) -> list[int]:
        """Bytes that each member may take."""
        indices = [member.backend.gpu.index for member in self._members]
        with cuda_errors("asking for the free memory"):
            free = [member.call(budget_of, member.backend.gpu, vram) for member in self._members]
        return [shared_budget(own, indices.count(index)) for own, index in zip(free, indices)]

    def batch_size(
        self, family: Family, tokens: int | None = None, top: int = 0, progress: Progress = no_progress
    ) -> BatchSize:
        # The largest that any of them wants, so that each hides its own copies.
        sizes = [member.call(member.backend.batch_size, family, tokens, top, progress) for member in self._members]
        return max(sizes, key=lambda size: size.tokens)

    def take_least(self) -> None:
        for member in self._members:
            member.call(member.backend.take_least)

    def new_cache(self, family: Family, capacity: int) -> PipelineCache:
        parts = [member.call(member.backend.new_cache, family, capacity) for member in self._members]
        return PipelineCache(parts, self._members, capacity)

    def state_access(self, family: Family, cache: Cache, writing: bool = False) -> StateAccess:
        assert isinstance(cache, PipelineCache), "a cache of another backend"
        if writing:  # a token of any kind has the scales made that values are kept times
            pending, _ = self.run(family, Batch(np.zeros(1, np.int32)), cache, None, no_progress)
            pending()
        access = [
            member.call(member.backend.state_access, family, part) for member, part in zip(self._members, cache.parts)
        ]
        return PipelineStates(cache, self._members, access)

    def new_collector(self, family: Family, output: bool, progress: Progress = no_progress) -> Collector:
        parts = [member.call(member.backend.new_collector, family, output, progress) for member in self._members]
        return PipelineCollector(output, parts, self._members)

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
        assert cache is None or isinstance(cache, PipelineCache), "a cache of another backend"
        assert collector is None or isinstance(collector, PipelineCollector), "a collector of another backend"
        chunks = [batch] if collector is not None else self._chunks(family, batch, logits)
        if len(chunks) > 1 and cache is None:
            cache = self._own_cache(family, len(batch.tokens))
        begun = []
        for number, chunk in enumerate(chunks):
            heard = _of_chunks(progress, number, len(chunks))
            asked = _Asked(logits, logits == "all" or number == len(chunks) - 1, timed)
            begun.append(self._pass_through(family, chunk, cache, asked, heard, collector))

        def head() -> Any:
            heads = [results[-1].result().pending for results in begun]
            results = [pending() for pending in heads if pending is not None]
            if len(results) == 1:
                return results[0]
            every = [cast(HeadResult, result) for result in results]
            logits_of = [one.logits for one in every if one.logits is not None]
            return replace(every[-1], logits=np.concatenate(logits_of))

        if not timed:
            return head, None
        result = head()
        return lambda: result, _added(part.result().stages for results in begun for part in results)

    def _chunks(self, family: Family, batch: Batch, logits: Logits) -> list[Batch]:
        """A long prompt's chunks, or the batch as it is."""
        size = chunk_tokens(len(batch.tokens), len(self._members))
        whole = len(batch.segments) > 1 or batch.targets is not None or logits == "pooled" or family.both_ways
        if whole or len(batch.tokens) <= size:
            return [batch]
        return [Batch(batch.tokens[at : at + size], batch.start + at) for at in range(0, len(batch.tokens), size)]

    def _own_cache(self, family: Family, tokens: int) -> PipelineCache:
        if self._own is None or self._own.capacity < tokens:
            self._drop_own()
            self._own = self.new_cache(family, tokens)
        return self._own

    def _drop_own(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def _pass_through(
        self,
        family: Family,
        batch: Batch,
        cache: PipelineCache | None,
        asked: _Asked,
        progress: Progress,
        collector: PipelineCollector | None,
    ) -> list[Future[_Passed]]:
        """Have each device take its turn with a batch: what each makes of it."""
        results: list[Future[_Passed]] = []
        for number, member in enumerate(self._members):
            before = results[-1] if results else None
            own_cache = cache.parts[number] if cache is not None else None
            own_collector = collector.parts[number] if collector is not None else None
            last = number == len(self._members) - 1
            heard = progress if last else _but_layers(progress)
            results.append(
                member.submit(self._take, number, before, family, batch, own_cache, asked, heard, own_collector)
            )
        return results

    @np.errstate(all="ignore")
    def _take(
        self,
        number: int,
        before: Future[_Passed] | None,
        family: Family,
        batch: Batch,
        cache: Cache | None,
        asked: _Asked,
        progress: Progress,
        collector: Collector | None,
    ) -> _Passed:
        """One device's turn, in its thread. What fails before it fails here, too."""
        member, received = self._members[number], before.result().parcel if before is not None else None
        crossing = self._crossings[number - 1] if number else None

        def receive(to: DeviceArray) -> ResidualBound | None:
            assert crossing is not None and received is not None, "the device before has sent it"
            member.laps.begin()
            return crossing.receive(received, to)

        with member.named(), cuda_errors("prefill"):
            if received is None:
                member.laps.begin()
            try:
                x, pending, stages = member.backend.advance(
                    family,
                    batch,
                    cache,
                    asked.logits,
                    progress,
                    asked.timed,
                    collector,
                    None if received is None else receive,
                    asked.head,
                )
            finally:
                if crossing is not None and received is not None:
                    crossing.give_back(received)
            member.laps.end()
            member.tokens += len(batch.tokens)
            if number < len(self._crossings):
                return _Passed(self._crossings[number].send(x), None, stages)
            if pending is None or asked.logits in ("ranks", "pooled"):
                return _Passed(None, pending, stages)
            result = pending()  # in the thread where the device is current
            return _Passed(None, lambda: result, stages)

    def floors(self, family: Family) -> list[tuple[str, Callable[[int], float]]]:
        own = [member.backend.floors(family) for member in self._members]
        return [_slowest(floors) for floors in zip(*own)]

    def memory_used(self) -> int | None:
        used = {member.backend.gpu.index: member.backend.memory_used() for member in self._members}  # a pool a device
        return sum(nbytes or 0 for nbytes in used.values())

    def close(self) -> None:
        with suppress(BackendError):
            self._drop_own()
        for member, crossing in zip(self._members, self._crossings):
            with suppress(BackendError), cuda_errors("closing"):
                member.call(crossing.close)
        self._crossings.clear()
        for member in self._members:
            member.close()
        self._members.clear()


def _slowest(floors: Sequence[tuple[str, Callable[[int], float]]]) -> tuple[str, Callable[[int], float]]:
    """The floor of several devices that work side by side."""
    return floors[0][0], lambda tokens: max(seconds(tokens) for _, seconds in floors)


class _Together:
    """A Progress of what several devices do at once: their sums."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, Lock()
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}

    def part(self, number: int) -> Progress:
        """The Progress of one of them."""

        def heard(stage: str, done: int, total: int) -> None:
            with self._lock:
                own = self._parts.setdefault(stage, {})
                own[number] = done, total
                self._progress(stage, sum(d for d, _ in own.values()), sum(t for _, t in own.values()))

        return heard


def _but_layers(progress: Progress) -> Progress:
    """A Progress for the devices before the last: layers are counted where they end."""

    def heard(stage: str, done: int, total: int) -> None:
        if stage != "prefill":
            progress(stage, done, total)

    return heard


def _of_chunks(progress: Progress, number: int, count: int) -> Progress:
    """A Progress for one of so many chunks."""

    def heard(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            done, total = number * total + done, count * total
        progress(stage, done, total)

    return heard


def _added(parts: Iterable[dict[str, Stage] | None]) -> dict[str, Stage]:
    """Stages of several devices' time, and of several chunks', added up."""
    sums: dict[str, Stage] = {}
    for stages in parts:
        for name, own in (stages or {}).items():
            stage = sums.setdefault(name, Stage())
            stage.seconds += own.seconds
            stage.flops += own.flops
            stage.weight_bytes += own.weight_bytes
    return sums
