"""Where a prefill's time goes: by stage, with the work that each stage was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STAGES = ("linear", "attention", "rest", "head")


@dataclass
class Stage:
    """Seconds spent in a stage; its multiplications and additions; bytes of the weights that it reads, each once."""

    seconds: float = 0.0
    flops: int = 0
    weight_bytes: int = 0


class Timeline:
    """Ops say when they enter a stage; what follows belongs to it. now(): a mark; between(a, b): seconds."""

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._now, self._between = now, between
        self._marks: list[tuple[str, Any, int, int]] = []

    def enter(self, stage: str, flops: int = 0, weight_bytes: int = 0) -> None:
        """The head is the last stage: the ops that it calls are part of it."""
        if not self._marks or self._marks[-1][0] != "head":
            self._marks.append((stage, self._now(), flops, weight_bytes))

    def stages(self) -> dict[str, Stage]:
        """What was entered, by name, once all is done."""
        result, end = {name: Stage() for name in STAGES}, self._now()
        marks = [mark for _, mark, _, _ in self._marks[1:]] + [end]
        for (name, start, flops, weight_bytes), until in zip(self._marks, marks):
            stage = result.setdefault(name, Stage())
            stage.seconds += self._between(start, until)
            stage.flops += flops
            stage.weight_bytes += weight_bytes
        return result
