"""Replicas of a model on a Ray cluster, and the blocks that are handed to them.

Ray starts, places and restarts the actors. What a lost one had in hand is given to whichever is free next, rather than
kept for it until it has been started again (as Ray's own retries of an actor's tasks, its ActorPool and Ray Data do):
where a machine has gone for good that would never be.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
import os
import time
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .. import __version__
from ..corpus.folder import Folder
from ..corpus.inputs import Block
from ..corpus.run import Run
from ..corpus.scorer import Done, Settings
from ..errors import KqprefillError
from .cluster import connected, share_of
from .rates import Rates
from .scorer import Scorer

_LOOK = 2.0  # seconds after which it is looked for stragglers, and for replicas that found no place
_MOST_LOSSES = 5  # of one block's workers: more are the block's fault
_MOST_DEATHS = 5  # of one replica before it has scored anything


@dataclass(frozen=True)
class Place:
    """Where a replica runs, with which version of kqprefill, and what it has opened (`corpus.identity`)."""

    node: str
    pid: int
    device: str
    version: str
    model: dict[str, Any]
    precision: dict[str, Any]


class Replica:
    """The actor. The model is opened by its first call, so that why it cannot be is an error like any other."""

    def __init__(self, model: Mapping[str, Any], settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._scorer: Scorer | None = None

    def ready(self) -> Place:
        """Open the model, if it is not. Raises as `kqprefill.load` does."""
        if self._scorer is None:
            self._scorer = Scorer.of(self._model, self._settings)
        scorer, node = self._scorer, ray.util.get_node_ip_address()
        device = scorer.model.backend.device_name
        return Place(node, os.getpid(), device, __version__, scorer.identity, scorer.precision)

    def write(self, block: Block, folder: Folder) -> Done:
        """Score a block. Raises as `BlockScorer.write` does."""
        self.ready()
        assert self._scorer is not None
        return self._scorer.write(block, folder)


@dataclass
class _Member:
    """A replica as the driver knows it. name: for people."""

    number: int
    actor: Any
    name: str
    deaths: int = 0  # since it last did something


@dataclass
class _Task:
    member: _Member
    block: Block
    since: float = field(default_factory=time.monotonic)


class Cluster:
    """Replicas of a model on a cluster; a context manager, at whose end they are gone.

    address: as `connected` has it; replicas: how many, None for as `share_of` chooses; model: as `Scorer.of` takes it,
    with the backend that was asked for; tell(line): hears what people should know; verbose: they see what Ray says,
    too. Raises as `connected` and `share_of` do.
    """

    def __init__(
        self,
        address: str,
        replicas: int | None,
        model: Mapping[str, Any],
        settings: Settings,
        tell: Callable[[str], None],
        verbose: bool = False,
    ) -> None:
        self._address, self._replicas, self._settings, self._tell = address, replicas, settings, tell
        self._verbose = verbose
        self._model = dict(model)
        self._members: list[_Member] = []
        self._opening: dict[Any, _Member] = {}
        self._working: dict[Any, _Task] = {}
        self._idle: deque[_Member] = deque()
        self._again: deque[Block] = deque()  # blocks whose worker has gone
        self._losses: Counter[str] = Counter()
        self._rates = Rates(tell)

    def __enter__(self) -> Cluster:
        self._stack = ExitStack()
        self._stack.enter_context(connected(self._address, self._verbose))
        try:
            share = share_of(ray.nodes(), self._model["backend"], self._replicas, self._model["vram"])
            self._model["backend"] = share.backend
            actor = ray.remote(Replica).options(
                num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_restarts=-1, scheduling_strategy="SPREAD"
            )
            self._actor: Any = actor
            for number in range(share.replicas):
                self._members.append(
                    _Member(number, self._actor.remote(self._model, self._settings), f"replica {number}")
                )
                self._open(self._members[-1])
        except BaseException:
            self._stack.close()
            raise
        self._rates.begin(len(self._members))
        return self

    def scored(self, blocks: Iterator[Block], run: Run) -> Iterator[tuple[Block, Done]]:
        """What comes of blocks, in the order in which they are done.

        A block is taken when a replica is free for it. Raises InputError where the run's folder was made with another
        model; KqprefillError where a replica has another model than the others, at a bad record, or where a block's
        workers die again and again.
        """
        more = True
        while True:
            while self._idle and more:
                block = self._again.popleft() if self._again else next(blocks, None)
                more = block is not None
                if block is not None:
                    member = self._idle.popleft()
                    self._working[member.actor.write.remote(block, run.folder)] = _Task(member, block)
            if not self._working and not more:
                return
            waiting = [*self._working, *self._opening]
            for ref in ray.wait(waiting, num_returns=1, timeout=_LOOK)[0]:
                if ref in self._opening:
                    self._opened(ref, self._opening.pop(ref), run)
                    continue
                task = self._working.pop(ref)
                done = self._result(ref, task)
                if done is None:
                    more = True
                    continue
                task.member.deaths = 0
                self._idle.append(task.member)
                self._rates.add(task.member.number, task.block, done)
                yield task.block, done
            for task in self._working.values():
                self._rates.look(task.member.number, task.block, task.since)
            self._rates.tell(len(self._opening))

    def note(self) -> str:
        """How it goes, beside a bar."""
        return self._rates.note(len(self._members) - len(self._opening))

    def table(self) -> Iterator[str]:
        """A line for each replica: where it ran, and how fast."""
        return self._rates.table()

    def _open(self, member: _Member) -> None:
        # Sent again for as long as the actor is being started, wherever that is.
        self._opening[member.actor.ready.options(max_task_retries=-1).remote()] = member

    def _opened(self, ref: Any, member: _Member, run: Run) -> None:
        """A replica can work, or could not be started."""
        try:
            place: Place = ray.get(ref)
        except RayTaskError as error:
            raise _cause(error, member.name) from None
        except RayError as error:
            self._gone(member, error)
            return
        member.name = f"replica {member.number} ({place.node}, {place.device}, process {place.pid})"
        self._rates.name(member.number, member.name)
        if place.version != __version__:
            raise KqprefillError(f"{member.name} has kqprefill {place.version}, and here is {__version__}")
        if "model" not in run.made_of:
            run.made_with(place.model, place.precision)
        elif run.made_of["model"]["digest"] != place.model["digest"]:
            raise KqprefillError(f"{place.model['path']} is another model for {member.name} than for the others")
        elif run.made_of["precision"] != place.precision:
            raise KqprefillError(f"{member.name} computes with another precision than the others: {place.precision}")
        self._idle.append(member)

    def _result(self, ref: Any, task: _Task) -> Done | None:
        """What came of a task; None where its worker has gone."""
        try:
            done: Done = ray.get(ref)
            return done
        except RayTaskError as error:
            raise _cause(error, task.member.name) from None
        except RayError as error:
            place = task.block.place
            self._losses[place] += 1
            if self._losses[place] >= _MOST_LOSSES:
                raise KqprefillError(
                    f"{task.block.where}: {_MOST_LOSSES} workers that had it have died; the last, {task.member.name}: "
                    f"{_first_line(error)}"
                ) from None
            self._again.append(task.block)
            self._gone(task.member, error)
            return None

    def _gone(self, member: _Member, error: RayError) -> None:
        """A replica's process or machine has gone. Ray starts it again; where it has given up, another is started."""
        member.deaths += 1
        if member.deaths > _MOST_DEATHS:
            raise KqprefillError(f"{member.name} dies whenever it is started: {_first_line(error)}") from None
        self._tell(f"{member.name} has gone; others do what it had, and Ray starts it again where there is room")
        if member.deaths > 1:
            with suppress(RayError):
                ray.kill(member.actor)
            member.actor = self._actor.remote(self._model, self._settings)
        self._open(member)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for member in self._members:
                with suppress(RayError):
                    ray.kill(member.actor)
        finally:
            self._stack.close()


def _cause(error: RayTaskError, name: str) -> KqprefillError:
    """What an actor's own code has raised."""
    cause = error.cause
    if isinstance(cause, KqprefillError):
        return cause
    return KqprefillError(f"{name}: {type(cause).__name__}: {' '.join(str(cause).split())}")


def _first_line(error: RayError) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
