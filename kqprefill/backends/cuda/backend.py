"""The CUDA backend: opens a GPU, uploads a model once, runs batches."""

from ..base import Backend, Cache
from ..timeline import Timeline
from .device import Gpu, cuda_errors
from .graphs import Graphs
from .kernels import Kernels, programs_for
from .memory import Workspace
from .ops import CudaOps
from .tiles import padded_head
from .weights import DeviceWeights


class CudaCache(Cache):
    """Halves [layer, k or v, tokens, head_count_kv, head_dim padded to 16] in device memory."""

    def __init__(self, gpu, config, capacity):
        super().__init__(capacity)
        self._gpu = gpu
        self._half = 2 * capacity * config.head_count_kv * padded_head(config.head_dim)
        self._buffer = gpu.allocate(2 * self._half * config.block_count, f"a cache of {capacity} tokens")
        # Attention multiplies what lies past a sequence's end by zero, which must not be NaN.
        gpu.zero(int(self._buffer.handle), self._buffer.size)

    def addresses(self, layer):
        """Device addresses of the layer's keys and values of token 0."""
        k = int(self._buffer.handle) + 2 * self._half * layer
        return k, k + self._half

    def close(self):
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
            self._buffer = None


class CudaBackend(Backend):
    """Raises BackendError where the GPU cannot be used."""

    name = "cuda"

    def __init__(self, device, portable=False):
        self.gpu = Gpu(device)
        self.hopper = self.gpu.capability == (9, 0) and not portable  # whether Hopper's own kernels run
        self.device_name = self.gpu.name
        self.kernels, self.workspace, self.weights = Kernels(self.gpu), Workspace(self.gpu), None
        self._graphs, self._prepared = Graphs(self.gpu, self.workspace), set()

    def load(self, model, progress):
        types = {weight.tensor.type for weight in model.matrices()}
        with cuda_errors("loading the model"):
            self.kernels.prepare(programs_for(model.config.head_dim, types, self.hopper), progress)
            self.weights = DeviceWeights(self.gpu, self.kernels, model, progress)

    def new_cache(self, model, capacity):
        return CudaCache(self.gpu, model.config, capacity)

    def run(self, model, batch, cache, logits, forward, progress, timed=False):
        with cuda_errors("prefill"):
            self.gpu.device.set_current()
            ops = CudaOps(self, model.config, batch, cache)
            if (ops.n, logits) not in self._prepared:
                ops.prepare(model, logits, progress)
                self._prepared.add((ops.n, logits))
            if timed:
                ops.timeline = self._timeline()
            x = forward(ops) if timed or cache is not None else self._graphs.run(ops, forward)
            head = ops.head(x, model.output_norm, model.output, logits)
            return head, ops.timeline.stages() if timed else None

    def _timeline(self):
        """Marks are events on the stream: what happens between two of them is the GPU's time."""
        self.kernels.overlap = False
        options = self.gpu.core.EventOptions(timing_enabled=True)

        def between(start, end):
            end.sync()
            return (end - start) / 1e3

        return Timeline(lambda: self.gpu.stream.record(options=options), between)

    def memory_used(self):
        return self.gpu.memory_peak()

    def close(self):
        if self.gpu is None:
            return
        self._graphs.clear()
        self.workspace.close()
        if self.weights is not None:
            self.weights.close()
        self.gpu.close()
        self.gpu = None
