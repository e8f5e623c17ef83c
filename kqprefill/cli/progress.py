"""How far a run is, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Columns
    from rich.progress import TaskID


class Bars:
    """Bars on stderr, one for each stage; a Progress (kqprefill.core) that can also be given a note."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: float, total: float | None, note: str = "") -> None:
        """A stage is so far. total: None where it is not known; note: beside the bar, such as tokens/s."""
        if stage not in self._tasks:
            self._tasks[stage] = self._columns.add_task(stage, total=total, note=note)
        self._columns.update(self._tasks[stage], completed=done, total=total, note=note)


class Watch:
    """A Progress (kqprefill.core) that shows how far it is, with tokens/s beside one of the stages, and remembers how
    far that is."""

    def __init__(self, bars: Bars | None, stage: str) -> None:
        self._bars, self._stage, self._tokens, self._begun = bars, stage, 0, 0.0
        self.done = 0.0  # as a part of all

    def begin(self, tokens: int) -> None:
        """So many tokens are being gone through from now on."""
        self._tokens, self._begun = tokens, time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        note = ""
        if stage == self._stage:
            self.done = done / total
            note = f"{self.done * self._tokens / (time.perf_counter() - self._begun):.0f} tokens/s"
        if self._bars is not None:
            self._bars(stage, done, total, note)


@contextmanager
def progress_bars(enabled: bool) -> Iterator[Bars | None]:
    """Bars where stderr is a terminal and they are `enabled`, else None. They are gone at the end."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with columns:
        yield Bars(columns)
