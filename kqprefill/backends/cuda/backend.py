"""The CUDA backend: opens a GPU, decides what of a model stays on it, runs batches."""

from concurrent.futures import ThreadPoolExecutor

from ..base import Backend
from ..timeline import Timeline
from .bounds import floors
from .cache import DeviceCache, HostCache
from .device import Gpu, cuda_errors
from .graphs import Graphs
from .kernels import Kernels, programs_for
from .memory import Downloads, Workspace
from .ops import CudaOps
from .rehearsal import products_of
from .residency import budget_of, make_plan
from .weights import DeviceWeights

PLANNED_TOKENS = 4096  # of the longest prompt, where the caller does not say; a longer one makes room for itself


class CudaBackend(Backend):
    """Raises BackendError where the GPU cannot be used."""

    name = "cuda"

    def __init__(self, device, portable=False):
        self.gpu = Gpu(device)
        self.hopper = self.gpu.capability == (9, 0) and not portable  # whether Hopper's own kernels run
        self.device_name = self.gpu.name
        self.kernels, self.workspace, self.weights = Kernels(self.gpu), Workspace(self.gpu), None
        self.downloads = Downloads(self.gpu)
        self._graphs, self._prepared, self._caches = Graphs(self.gpu, self.workspace), set(), []
        self._ran = False  # whether a batch has been through

    def load(self, model, progress, vram=None, tokens=None, ranks=False):
        types = {weight.tensor.type for weight in model.matrices()}
        tokens = tokens or PLANNED_TOKENS
        if not ranks:  # one prompt
            tokens = min(tokens, model.config.context_length)
        self._ranks = ranks
        with cuda_errors("loading the model"):
            self._budget = budget_of(self.gpu, vram)
            plan = make_plan(model, self.gpu, self.hopper, self._budget, tokens, ranks=ranks)
            self.kernels.prepare(programs_for(model.config.head_dim, types, self.hopper), progress)
            self.weights = DeviceWeights(self.gpu, self.kernels, model)
            products = products_of(model, self.gpu, self.hopper, tokens, ranks)
            with ThreadPoolExecutor(1, initializer=self.gpu.device.set_current) as pool:
                compiled = pool.submit(self.kernels.prepare, products, progress)
                self.weights.place(plan, progress)
                compiled.result()
            self._prepared.add((tokens, tokens if ranks else 1))
            self.plan = plan

    def new_cache(self, model, capacity):
        with cuda_errors("making a cache"):
            kind = DeviceCache
            others = self.plan.nbytes - self.plan.parts.get("caches", 0) + self._cache_bytes()
            if others + kind.bytes_needed(model.config, capacity) > self._budget:
                kind = HostCache
                self._make_room(model, self.plan.tokens, kind.bytes_needed(model.config, capacity), lambda *_: None)
            cache = kind(self.gpu, model.config, capacity)
        self._caches.append(cache)
        return cache

    def run(self, model, batch, cache, logits, forward, progress, timed=False):
        with cuda_errors("prefill"):
            self.gpu.device.set_current()
            if self._ran:
                self.weights.settle()
            ranks = self._ranks or batch.targets is not None
            if len(batch.tokens) > self.plan.tokens or self.weights.plan is None or ranks != self._ranks:
                self._ranks = ranks
                self._make_room(model, max(len(batch.tokens), self.plan.tokens), 0, progress)
            ops = CudaOps(self, model.config, batch, cache)
            shape = ops.n, ops.positions_of(logits)
            if shape not in self._prepared:
                ops.prepare(model, logits, progress)
                self._prepared.add(shape)
            if timed:
                ops.timeline = self._timeline()
            one_by_one = timed or cache is not None or self.plan.streamed or len(batch.segments) > 1
            x = forward(ops) if one_by_one else self._graphs.run(ops, forward)
            head = model.head(ops, x, logits)
            self._ran = True
            return head, ops.timeline.stages() if timed else None

    def _cache_bytes(self):
        return sum(cache.device_bytes for cache in self._caches)

    def _make_room(self, model, tokens, more, progress):
        """Let layers leave the device where a batch of so many tokens, or `more` bytes for a cache, need their room."""
        plan = make_plan(model, self.gpu, self.hopper, self._budget, tokens, self._cache_bytes() + more, self._ranks)
        placed = self.weights.plan
        if placed is None or (plan.resident, plan.slot_bytes, plan.tile_bytes) != (
            placed.resident,
            placed.slot_bytes,
            placed.tile_bytes,
        ):
            self._graphs.clear()
            self.weights.place(plan, progress)
        self.plan = plan

    def _timeline(self):
        """Marks are events on the stream: what happens between two of them is the GPU's time."""
        self.kernels.overlap = False
        options = self.gpu.core.EventOptions(timing_enabled=True)

        def between(start, end):
            end.sync()
            return (end - start) / 1e3

        return Timeline(lambda: self.gpu.stream.record(options=options), between)

    def floors(self, model):
        return floors(self.plan, model, self.gpu)

    def memory_used(self):
        return self.gpu.memory_peak()

    def close(self):
        if self.gpu is None:
            return
        self._graphs.clear()
        self.workspace.close()
        self.downloads.close()
        if self.weights is not None:
            self.weights.close()
        self.gpu.close()
        self.gpu = None
