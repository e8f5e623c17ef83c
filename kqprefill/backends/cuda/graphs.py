"""CUDA graphs of a batch's launches, for prompts short enough that launching from Python takes longer than running."""

from .device import check

LONGEST = 2048  # tokens; beyond, the GPU is busy for longer than the launches take (8 ms for 36 layers)
KEPT = 16  # prompt lengths


def capture(gpu, launch):
    """(an executable graph of what launch() launches, launch()'s result)"""
    driver, stream = gpu.driver, gpu.stream.handle
    check(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    try:
        result = launch()
    finally:
        captured = check(driver.cuStreamEndCapture(stream))
    try:
        return check(driver.cuGraphInstantiate(captured, 0)), result
    finally:
        check(driver.cuGraphDestroy(captured))


class Graphs:
    """Runs forward(ops): the second time that a prompt length comes it is captured, and is one graph launch from then on.

    The first time makes what is made once (scales, descriptors), which a graph must not hold. A graph holds the addresses of work
    buffers, so all are dropped when one of these has moved.
    """

    def __init__(self, gpu, workspace):
        self._gpu, self._workspace = gpu, workspace
        self._graphs, self._seen, self._generation = {}, set(), None

    def run(self, ops, forward):
        """forward(ops)'s result. ops has uploaded its inputs; forward only launches."""
        n = ops.n
        if n > LONGEST:
            return forward(ops)
        self._forget_if_moved()
        if n not in self._graphs:
            if n not in self._seen:
                x = forward(ops)
                self._forget_if_moved()  # buffers have grown: later graphs hold their new addresses
                self._seen.add(n)
                return x
            if len(self._graphs) == KEPT:
                self._drop(next(iter(self._graphs)))
            self._graphs[n] = capture(self._gpu, lambda: forward(ops))
        graph, x = self._graphs[n]
        check(self._gpu.driver.cuGraphLaunch(graph, self._gpu.stream.handle))
        return x

    def _forget_if_moved(self):
        if self._generation != self._workspace.generation:
            self.clear()
            self._generation = self._workspace.generation

    def _drop(self, n):
        graph, _ = self._graphs.pop(n)
        self._gpu.stream.sync()
        check(self._gpu.driver.cuGraphExecDestroy(graph))

    def clear(self):
        for n in list(self._graphs):
            self._drop(n)
        self._seen.clear()
