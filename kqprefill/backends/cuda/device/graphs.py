"""CUDA graphs of a batch's launches: the GPU need not wait for the host, which takes 10 to 70 µs for each launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from .gpu import Gpu, check

# Tokens; with more the GPU is busy for longer than the launches take (8 ms for 36 layers, 40 for 48 with experts), and
# the host has the time to capture them.
SHORT = 2048
KEPT = 16  # prompt lengths

Result = TypeVar("Result")


def capture(gpu: Gpu, launch: Callable[[], Result]) -> tuple[Any, Result]:
    """(an executable graph of what launch() launches, launch()'s result)"""
    driver, stream = gpu.driver, gpu.stream.handle
    check(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    gpu.capturing = True
    try:
        result = launch()
    finally:
        gpu.capturing = False
        captured = check(driver.cuStreamEndCapture(stream))
    try:
        return check(driver.cuGraphInstantiate(captured, 0)), result
    finally:
        check(driver.cuGraphDestroy(captured))


class Graphs:
    """Runs the launches of prompts: the second and later ones of a length, and of a kind, are one graph launch each.

    The first prompt of a length makes what is made once (scales, tensor maps), which a graph must not hold; the second
    is captured, or the next, as long as work arrays have moved while a prompt was launched: what was made before that
    is for addresses that are no longer theirs. A short prompt is captured, and then the graph launched; one that is
    longer than SHORT is launched, and captured while the GPU runs it. A graph holds the addresses of work arrays and
    tensor maps, so all graphs are dropped when one of these has moved: generation() changes then.
    """

    def __init__(self, gpu: Gpu, generation: Callable[[], object]) -> None:
        self._gpu, self._generation_now = gpu, generation
        self._graphs: dict[Hashable, tuple[Any, Any]] = {}
        self._seen: set[Hashable] = set()
        self._generation: object = None

    def run(self, tokens: int, launch: Callable[[], Result], kind: Hashable = None) -> Result:
        """launch()'s result, for a prompt of so many tokens whose inputs have been uploaded; launch only launches, the
        same for all prompts of one kind, and each time that it is called."""
        self._forget_if_moved()
        key = tokens, kind
        if key in self._graphs:
            return cast(Result, self.launch(tokens, kind))
        seen = key in self._seen
        if seen and len(self._graphs) == KEPT:
            self._drop(next(iter(self._graphs)))
        if seen and tokens <= SHORT:
            self._graphs[key] = capture(self._gpu, launch)
            return cast(Result, self.launch(tokens, kind))
        result = launch()
        if not self._forget_if_moved():
            self._seen.add(key)
            if seen:
                self._graphs[key] = capture(self._gpu, launch)
        return result

    def captured(self, tokens: int, kind: Hashable = None) -> Any:
        """What launch() returned when the graph for such prompts was captured; None where there is no such graph."""
        self._forget_if_moved()
        return self._graphs[tokens, kind][1] if (tokens, kind) in self._graphs else None

    def launch(self, tokens: int, kind: Hashable = None) -> Any:
        """Launch the graph that there is for such prompts. Returns what is `captured`."""
        graph, result = self._graphs[tokens, kind]
        check(self._gpu.driver.cuGraphLaunch(graph, self._gpu.stream.handle))
        return result

    def _forget_if_moved(self) -> bool:
        """Drop all graphs if anything has moved since this was last called, and say so."""
        moved = self._generation != self._generation_now()
        if moved:
            self.clear()
            self._generation = self._generation_now()
        return moved

    def _drop(self, key: Hashable) -> None:
        graph, _ = self._graphs.pop(key)
        self._gpu.stream.sync()
        check(self._gpu.driver.cuGraphExecDestroy(graph))

    def clear(self) -> None:
        """Drop all graphs."""
        for key in list(self._graphs):
            self._drop(key)
        self._seen.clear()
