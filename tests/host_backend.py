"""The CUDA backend itself over emulated kernels: plans, weights, caches and graphs as on a GPU with so much memory."""

from contextlib import nullcontext

from cuda.bindings.driver import CUresult

from emulator import EmulatedGpu, Emulator
from host_gpu import Buffer
from kqprefill.backends.cuda import backend as backend_module
from kqprefill.backends.cuda.device import graphs
from kqprefill.errors import BackendError

OK = (CUresult.CUDA_SUCCESS,)


class HostBackendGpu(EmulatedGpu):
    """It counts what is held of its memory, and has no more than `limit` bytes."""

    index, name, clock, memory_rate = 0, "the host", 1e9, 1e12

    def __init__(self, device=0):
        super().__init__((8, 0), 99 << 10)
        self.held = self.peak = 0
        self.limit = 1 << 40
        self.driver.cuGraphLaunch = lambda graph, stream: (graph(), OK)[1]
        self.driver.cuGraphExecDestroy = lambda graph: OK

    def allocate(self, nbytes, what):
        if self.held + nbytes > self.limit:
            raise BackendError(f"allocating memory for {what}: the GPU is out of memory")
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        buffer, give_back = Buffer(nbytes), Buffer.close

        def close(stream):
            self.held -= nbytes
            give_back(buffer, stream)

        buffer.close = close
        return buffer

    def memory(self):
        return self.limit - self.held, self.limit

    def memory_peak(self):
        return self.peak

    def bus_rate(self):
        return 5e10

    def close(self):
        pass


class HostLauncher(Emulator):
    """It counts launches by kernel, those of graphs too; while a graph is captured, they are only written down."""

    def __init__(self):
        super().__init__()
        self.counts, self._captured = {}, None

    def prepare(self, programs, progress):
        pass

    def expecting(self, upcoming, progress):
        return nullcontext()

    def launch(self, program, kernel, grid, **arguments):
        if self._captured is not None:
            self._captured.append((program, kernel, grid, arguments))
            return
        self.counts[kernel] = self.counts.get(kernel, 0) + 1
        super().launch(program, kernel, grid, **arguments)

    def capture(self, gpu, launch):
        """graphs.capture's: (what launches it all, launch()'s result)"""
        self._captured = captured = []
        gpu.capturing = True
        try:
            result = launch()
        finally:
            self._captured, gpu.capturing = None, False

        def replay():
            for program, kernel, grid, arguments in captured:
                self.launch(program, kernel, grid, **arguments)

        return replay, result


def run_on_host(patch):
    """Have every CudaBackend that is made from now on run there; patch: pytest's monkeypatch."""

    def launcher_of(gpu, target):
        gpu.launcher = HostLauncher()
        return gpu.launcher

    patch.setattr(backend_module, "Gpu", HostBackendGpu)
    patch.setattr(backend_module, "Launcher", launcher_of)
    patch.setattr(graphs, "capture", lambda gpu, launch: gpu.launcher.capture(gpu, launch))
