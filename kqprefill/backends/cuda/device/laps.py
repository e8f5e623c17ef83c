"""How long stretches of a stream took, measured by the GPU."""

from __future__ import annotations

from collections import deque
from typing import Any

from ....timeline import Timeline
from .gpu import Gpu


def timeline_of(gpu: Gpu) -> Timeline:
    """A Timeline whose marks are events on a GPU's stream: what happens between two of them is the GPU's time."""
    options = gpu.core.EventOptions(timing_enabled=True)

    def between(start: Any, end: Any) -> float:
        end.sync()
        return float(end - start) / 1e3

    return Timeline(lambda: gpu.stream.record(options=options), between)


class Laps:
    """Stretches of one GPU's stream, one after another. One thread begins and ends them."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._options = gpu, gpu.core.EventOptions(timing_enabled=True)
        self._begun: Any = None
        self._running: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def begin(self) -> None:
        """What is launched from now on belongs to the stretch."""
        self._begun = self._gpu.stream.record(options=self._options)

    def end(self) -> None:
        """The stretch ends with what has been launched."""
        self._running.append((self._begun, self._gpu.stream.record(options=self._options)))
        while self._running and self._running[0][1].is_done:
            self._add()

    def seconds(self) -> float:
        """Of all stretches so far; waits until they are through."""
        while self._running:
            self._running[0][1].sync()
            self._add()
        return self._seconds

    def _add(self) -> None:
        begun, ended = self._running.popleft()
        self._seconds += float(ended - begun) / 1e3
