"""The devices of a pipeline, and what each of them has a part of: caches, states, collectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from numpy.typing import NDArray

from ....collector import Collector, Squares
from ....core import Float32Array
from ....errors import BackendError
from ...base import Cache, StateAccess, TakeRows
from ..backend import CudaBackend
from ..device.laps import Laps

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Member:
    """One of the devices: its backend, and the one thread that speaks to it, in which it is current."""

    def __init__(self, device: int, kernels: str, ahead: int) -> None:
        self._device, self._thread = device, ThreadPoolExecutor(1, thread_name_prefix=f"device-{device}")
        self.tokens = 0  # of the batches that have gone through
        try:
            self.backend = self.submit(CudaBackend, device, kernels, ahead).result()  # says which device it is
            self.laps = self.call(Laps, self.backend.gpu)
        except BaseException:
            self._thread.shutdown()
            raise

    def submit(self, work: Callable[_P, _R], *args: _P.args, **named: _P.kwargs) -> Future[_R]:
        """Have something done after all that was asked for before."""
        return self._thread.submit(work, *args, **named)

    def call(self, work: Callable[_P, _R], *args: _P.args, **named: _P.kwargs) -> _R:
        """The same, waited for. Raises BackendErrors with the device's name before them."""
        with self.named():
            return self.submit(work, *args, **named).result()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have a BackendError inside the block say which device it is of."""
        try:
            yield
        except BackendError as error:
            raise BackendError(f"device {self._device}: {error}") from error

    def close(self) -> None:
        with suppress(BackendError):
            self.call(self.backend.close)
        self._thread.shutdown(cancel_futures=True)


class PipelineCache(Cache):
    """A cache of each device's, for its own layers."""

    def __init__(self, parts: Sequence[Cache], members: Sequence[Member], capacity: int) -> None:
        super().__init__(capacity)
        self.parts, self._members = parts, members

    def close(self) -> None:
        for part, member in zip(self.parts, self._members):
            member.call(part.close)


class PipelineStates(StateAccess):
    """Each layer's state on the device that has it."""

    def __init__(self, cache: PipelineCache, members: Sequence[Member], access: Sequence[StateAccess]) -> None:
        self._cache, self._members, self._access = cache, members, access

    def _ask(self, layer: int, what: Callable[[StateAccess], _R]) -> _R:
        for member, part, access in zip(self._members, self._cache.parts, self._access):
            if layer in member.backend.share.layers:
                part.length = self._cache.length
                return member.call(what, access)
        raise AssertionError("every layer has a device")

    def rows(self, layer: int, end: int, wide: bool, take: TakeRows, live: bool = False) -> Callable[[], None]:
        return self._ask(layer, lambda access: access.rows(layer, end, wide, take, live))

    def recurrence(self, layer: int) -> tuple[Float32Array, Float32Array]:
        return self._ask(layer, lambda access: access.recurrence(layer))

    def write(self, layer: int, begin: int, first: NDArray[Any], second: NDArray[Any]) -> None:
        self._ask(layer, lambda access: access.write(layer, begin, first, second))

    def write_recurrence(self, layer: int, matrices: Float32Array, rows: Float32Array) -> None:
        self._ask(layer, lambda access: access.write_recurrence(layer, matrices, rows))

    def close(self) -> None:
        for member, access in zip(self._members, self._access):
            member.call(access.close)


class PipelineCollector(Collector):
    """A collector on each device, of its own layers' inputs."""

    def __init__(self, output: bool, parts: Sequence[Collector], members: Sequence[Member]) -> None:
        super().__init__(output)
        self.parts, self._members = parts, members

    def sums(self) -> Mapping[str, Squares]:
        return {
            name: own for part, member in zip(self.parts, self._members) for name, own in member.call(part.sums).items()
        }

    def squares(self) -> dict[tuple[str, ...], Squares]:
        both = [member.call(part.squares) for part, member in zip(self.parts, self._members)]
        return {names: own for part in both for names, own in part.items()}

    def close(self) -> None:
        for part, member in zip(self.parts, self._members):
            member.call(part.close)
