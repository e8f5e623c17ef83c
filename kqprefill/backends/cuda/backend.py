"""The CUDA backend: opens a GPU, decides what of a model stays on it, runs batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...collector import Collector
from ...core import KEYS_PER_TOKEN, Batch, Logits, PendingHead, Progress, no_progress
from ...errors import BackendError
from ...models.family import Family
from ...models.precision import Precision, takes_int8
from ...timeline import Stage
from ..base import Backend, BatchSize, Cache, Loaded, StateAccess
from ..budget import Budget
from .batch_size import choose_batch, first_tokens, with_likeliest
from .bounds import Speed, floors
from .device.arrays import DeviceArray
from .device.gpu import Gpu, cuda_errors, reporting
from .device.laps import timeline_of
from .device.launcher import Launcher
from .device.workspace import Downloads, Workspace
from .gemm.tensor_maps import TensorMaps
from .kernel_set import kernel_set_of
from .kv_cache import DeviceCache, HostCache, states_of
from .ops.attention_layout import key_rows
from .ops.batch import Residual, ResidualBound, is_last_alone, received
from .ops.collector import DeviceCollector
from .ops.context import Context
from .ops.cuda_ops import CudaOps
from .ops.head import RANKED
from .ops.latent import expanded_bytes
from .ops.prompt_graphs import Launched, PromptGraphs
from .programs import SQUARES, int8_program, weight_program
from .rehearsal import LIKELIEST, collected_bytes, plan_model, rehearse
from .state_access import DeviceStates
from .weights.plan import Plan, budget_of
from .weights.share import Share
from .weights.small_arrays import SmallArrays
from .weights.store import WeightsOnDevice

PLANNED_TOKENS = 4096  # of the longest prompt, where the caller does not say; a longer one makes room for itself


class CudaBackend(Backend):
    """Runs one model, or some of its layers, on one GPU. Raises BackendError where the GPU cannot be used."""

    name = "cuda"
    ahead = 1
    plan: Plan | None = None
    _precision: Precision = "exact"  # that the model was loaded with

    def __init__(self, device: int, kernels: str = "auto", ahead: int = 1) -> None:
        """ahead: batches that may be started before one is waited for."""
        self.gpu = Gpu(device)
        self.device_name = self.gpu.name
        with cuda_errors("NVRTC"):
            self.kernel_set = kernel_set_of(self.gpu.capability, kernels)
        self.launcher = Launcher(self.gpu, self.kernel_set.target)
        self.work, self.downloads, self.maps = Workspace(self.gpu), Downloads(self.gpu, ahead), TensorMaps(self.gpu)
        self._graphs = PromptGraphs(
            self.gpu, lambda: (self.work.generation, self.maps.generation, self.weights.halves.generation)
        )
        self._caches: list[DeviceCache] = []
        self._collectors: list[DeviceCollector] = []
        self._small: SmallArrays | None = None
        self._weights: WeightsOnDevice | None = None
        self._context: Context | None = None
        self._share: Share | None = None
        self._speed: Speed | None = None
        self._size: BatchSize | None = None  # of batches to score, once it has been chosen
        self._budget = 0
        self._ranks = self._least = False  # whether the plan is for batches with targets; for no halves
        self._ran = self._closed = False  # whether a batch has been through; whether all has been given back

    @property
    def plans(self) -> Sequence[Plan]:
        return () if self.plan is None else (self.plan,)

    @property
    def share(self) -> Share:
        """The layers that run here, once a model is loaded."""
        if self._share is None:
            raise BackendError("no model has been loaded")
        return self._share

    @property
    def context(self) -> Context:
        """What ops work with, once a model is loaded."""
        if self._context is None:
            raise BackendError("no model has been loaded")
        return self._context

    @property
    def weights(self) -> WeightsOnDevice:
        """The loaded model's."""
        if self._weights is None:
            raise BackendError("no model has been loaded")
        return self._weights

    @property
    def loaded(self) -> Loaded | None:
        return self._weights.loaded if self._weights is not None else None

    def load(
        self,
        family: Family,
        progress: Progress,
        vram: Budget | None = None,
        tokens: int | None = None,
        ranks: bool = False,
        precision: Precision = "exact",
        share: Share | None = None,
    ) -> None:
        """As Backend.load; share: the layers to run here, all unless given."""
        self._precision = precision
        self._ranks, self._size, self._speed = ranks, None, Speed(family, self.gpu, self.kernel_set, precision)
        self._share = share or Share.whole(family)
        with cuda_errors("loading the model"):
            self._budget = budget_of(self.gpu, vram)
            if not ranks:  # one prompt
                tokens = min(tokens or PLANNED_TOKENS, family.config.context_length)
            if tokens is None:
                plan, self._size = choose_batch(self._speed, lambda n: self._make_plan(family, n, 0, True))
            else:
                plan = self._make_plan(family, tokens, 0, ranks)
            weight_programs = {weight_program(weight.tensor.type) for weight in family.matrices()}
            if precision == "int8":
                weight_programs |= {int8_program(w.tensor.type) for w in family.matrices() if takes_int8(w)}
            self.launcher.prepare(weight_programs, progress)  # which placing launches
            self._small = SmallArrays(self.gpu)
            self._weights = WeightsOnDevice(self.gpu, self.launcher, family, precision)
            self._context = Context.of(
                self.gpu,
                self.kernel_set,
                self.launcher,
                self.work,
                self.downloads,
                self.maps,
                self._weights,
                self._small,
            )
            with ThreadPoolExecutor(1, initializer=self.gpu.device.set_current) as pool:
                compiled = pool.submit(self.launcher.prepare, plan.needs.programs, progress)
                self._weights.place(plan, progress)
                compiled.result()
            self.plan = plan

    def batch_size(
        self, family: Family, tokens: int | None = None, top: int = 0, progress: Progress = no_progress
    ) -> BatchSize:
        assert self._speed is not None and self.plan is not None, "a model is loaded before it is scored with"
        with cuda_errors("planning batches"):
            self.gpu.device.set_current()
            if tokens is not None:
                return BatchSize(tokens, first_tokens(self._speed, self.plan, tokens))
            if self._size is None:
                held = self._cache_bytes(family)
                try:
                    plan, size = choose_batch(self._speed, lambda n: self._make_plan(family, n, held, True))
                except BackendError:  # perhaps all that is to be scored fits a smaller batch, which makes its own room
                    return BatchSize()
                self._place(plan, True, progress)
                self._size = size
            return with_likeliest(self._size, top, LIKELIEST, RANKED.itemsize)

    def take_least(self) -> None:
        self._least = True
        if self.plan is not None:
            self._place(self.plan.with_halves(0), self._ranks, no_progress)

    def new_cache(self, family: Family, capacity: int) -> Cache:
        assert self.plan is not None, "a model is loaded before it is given a cache"
        with cuda_errors("making a cache"):
            kind, states = DeviceCache, states_of(family, self.share.layers)
            expanded = self._expanded_bytes(family, capacity)
            plan = self.plan.with_caches(self._cache_bytes(family) + expanded + kind.bytes_needed(states, capacity))
            if plan.nbytes <= self._budget:
                self._place(plan, self._ranks, no_progress)
            else:
                kind = HostCache
                more = kind.bytes_needed(states, capacity) + expanded
                self._make_room(family, plan.tokens, more, self._ranks, no_progress)
            cache = kind(self.gpu, states, capacity, self.share.layers)
        self._caches = [*(other for other in self._caches if other.device_bytes), cache]
        return cache

    def state_access(self, family: Family, cache: Cache, writing: bool = False) -> StateAccess:
        assert isinstance(cache, DeviceCache), "a cache of another backend"
        assert self.plan is not None, "a model is loaded before it has a cache"
        if writing:  # a token of any kind has the scales made that values are kept times
            pending, _ = self.run(family, Batch(np.zeros(1, np.int32)), cache, None, no_progress)
            pending()
        with cuda_errors("reading a state"):
            self.gpu.device.set_current()
            return DeviceStates(self.context, family, cache)

    def new_collector(self, family: Family, output: bool, progress: Progress = no_progress) -> Collector:
        assert self.plan is not None, "a model is loaded before it is given a collector"
        with cuda_errors("making room for sums of squares"):
            self.gpu.device.set_current()
            self.launcher.prepare([SQUARES], progress)
            needed = collected_bytes(family, self.gpu, self.kernel_set, output, self._precision)
            self._make_room(family, self.plan.tokens, 0, self._ranks, progress, needed)
            collector = DeviceCollector(output, self.gpu, self.launcher, needed)
        self._collectors = [*(other for other in self._collectors if other.room), collector]
        return collector

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
        _, pending, stages = self.advance(family, batch, cache, logits, progress, timed, collector)
        assert pending is not None, "the last layers' device has the head"
        return pending, stages

    def advance(
        self,
        family: Family,
        batch: Batch,
        cache: Cache | None,
        logits: Logits,
        progress: Progress,
        timed: bool = False,
        collector: Collector | None = None,
        receive: Callable[[DeviceArray], ResidualBound | None] | None = None,
        head: bool = True,
    ) -> tuple[Residual, PendingHead | None, dict[str, Stage] | None]:
        """As `run`, through the layers that this device runs.

        receive(to): launches what puts the residual stream that another device has made into an array, and gives its
        bound; None where the model's first layer is here. head: whether what comes after the model's last layer is
        asked for. Returns the residual stream after the last of the layers, and what `run` returns: None for the head
        where there is none, or the model's last layer is elsewhere.
        """
        assert cache is None or isinstance(cache, DeviceCache), "a cache of another backend"
        assert collector is None or isinstance(collector, DeviceCollector), "a collector of another backend"
        with cuda_errors("prefill"):
            self.gpu.device.set_current()
            if self._ran:
                self.weights.settle()
            self._make_room_for(family, batch, progress)
            self.maps.make_room()

            alone, tokens = is_last_alone(logits), len(batch.tokens)

            def upcoming() -> tuple[Any, ...]:
                given = family, self.gpu, self.kernel_set, batch, logits
                return rehearse(*given, share=self.share, precision=self._precision, last_alone=alone).programs

            streaming, kept = self.weights.streaming, cache is not None or collector is not None
            from_host = streaming or self.share.embeds_from_host(family, streaming)
            one_by_one = timed or kept or from_host or len(batch.segments) > 1

            with self.launcher.expecting(upcoming, progress):
                again = None if one_by_one else self._graphs.begin_again(batch, alone)
                ops = again.ops if again else CudaOps(self.context, family, batch, cache, last_alone=alone)
                ops.collector = collector
                if timed:
                    self.launcher.overlap = False
                    ops.timeline = timeline_of(self.gpu)

                incoming: Residual | None = None
                if receive is not None:
                    values = received(ops, family)
                    incoming = Residual(values, receive(values))
                    self.launcher.fence()

                def forward() -> Launched:
                    ops.rewind()
                    heard = no_progress if self.gpu.capturing else progress
                    residual: Residual = family.forward(ops, heard, self.share.layers, incoming)
                    return Launched(ops, residual.finished())  # what is launched later is in no graph

                if again is not None:
                    self._graphs.launch(tokens, alone)
                    x = again.x
                else:
                    x = (forward() if one_by_one else self._graphs.run(tokens, forward, alone)).x
                pending: PendingHead | None = None
                if self.share.is_last and head:
                    pending = family.finish(ops, x, logits)
                    if collector is not None:
                        pending = self._after(pending)
                else:
                    self._end(batch, cache)
            self._ran = True
            if ops.timeline is None:
                return x, None if pending is None else reporting("prefill", pending), None
            result = None if pending is None else pending()
            return x, None if result is None else lambda: result, ops.timeline.stages()

    def _end(self, batch: Batch, cache: DeviceCache | None) -> None:
        """What a head does for a batch beside its logits, where there is none."""
        if self.weights.streaming:
            self.weights.prefetch()
        if cache is not None:
            cache.end_batch(batch.start, len(batch.tokens))

    def _after(self, pending: PendingHead) -> PendingHead:
        """The same, once all that was launched so far has run."""
        landed = self.gpu.stream.record()

        def wait() -> Any:
            landed.sync()
            return pending()

        return wait

    def _cache_bytes(self, family: Family) -> int:
        """Of the caches that there are, and of what a layer's latent rows in the largest are expanded to."""
        held = sum(cache.device_bytes for cache in self._caches)
        return held + expanded_bytes(family, self._largest_cache())

    def _expanded_bytes(self, family: Family, capacity: int) -> int:
        """By how much a cache of so many tokens lets what latent rows are expanded to grow."""
        largest = self._largest_cache()
        return expanded_bytes(family, max(capacity, largest)) - expanded_bytes(family, largest)

    def _largest_cache(self) -> int:
        return max((cache.capacity for cache in self._caches if cache.device_bytes), default=0)

    def _make_room_for(self, family: Family, batch: Batch, progress: Progress) -> None:
        """Plan anew where a batch takes more than was planned for: tokens, rows of keys, or targets."""
        plan, ranks = self.plan, self._ranks or batch.targets is not None
        assert plan is not None
        needed = len(batch.tokens)
        if batch.targets is not None:
            needed = max(needed, -(-key_rows(family, self.kernel_set, batch.segments) // KEYS_PER_TOKEN))
        if needed > plan.tokens or self.weights.plan is None or ranks != self._ranks:
            self._make_room(family, max(needed, plan.tokens), 0, ranks, progress)

    def _make_room(
        self, family: Family, tokens: int, more: int, ranks: bool, progress: Progress, sums: int = 0
    ) -> None:
        """Let layers leave the device where a batch of so many tokens, or `more` bytes for a cache, or `sums` for a
        collector's sums, need their room."""
        self._place(self._make_plan(family, tokens, self._cache_bytes(family) + more, ranks, sums), ranks, progress)

    def _place(self, plan: Plan, ranks: bool, progress: Progress) -> None:
        """Have the weights lie as another plan says; ranks: whether it is for batches with targets."""
        placed = self.weights.plan
        if placed is None or not plan.places_as(placed):
            self._graphs.clear()
            self.weights.place(plan, progress)
        else:
            self.weights.halves.give_room(plan.halves_bytes)
        self.plan, self._ranks = plan, ranks

    def _make_plan(self, family: Family, tokens: int, cache_bytes: int, ranks: bool, sums: int = 0) -> Plan:
        """sums: bytes of a collector's sums that is yet to be made."""
        sums += sum(collector.room for collector in self._collectors)
        plan = plan_model(
            family,
            self.gpu,
            self.kernel_set,
            self._budget,
            tokens,
            cache_bytes,
            ranks,
            self.share,
            sums_bytes=sums,
            precision=self._precision,
        )
        return plan.with_halves(0) if self._least else plan

    def floors(self, family: Family) -> list[tuple[str, Callable[[int], float]]]:
        assert self.plan is not None
        return floors(self.plan, family, self.gpu, self._precision)

    def memory_used(self) -> int | None:
        return self.gpu.memory_peak()

    def unload(self) -> None:
        """Free the model's weights, and what was made for it."""
        self._graphs.clear()
        for held in (self._weights, self._small):
            if held is not None:
                held.close()
        self._weights = self._small = self._context = None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.unload()
        self.work.close()
        self.downloads.close()
        self.maps.close()
        self.gpu.close()
