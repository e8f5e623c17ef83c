"""Device memory that is reused from batch to batch, and copies to the host that are waited for later."""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import math
from typing import Any

import numpy as np

from .arrays import DeviceArray
from .gpu import Gpu, check

ALIGNMENT = 256  # bytes: of every array that shares an allocation with others


def aligned(nbytes: int) -> int:
    """nbytes, rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_COMPARED = 64 << 10  # bytes, at most, that are held against what is there


class Workspace:
    """Named work arrays. Each name's memory grows to the largest size asked for and is then reused; new memory is
    zeroed.

    generation: changes whenever memory has moved, so that whoever keeps addresses (a CUDA graph) can tell.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers: dict[str, Any] = {}
        # What the arrays hold that nobody but `keep` has written, and the generation in which it did.
        self._kept: dict[str, tuple[int, bytes]] = {}
        self.generation = 0

    def array(self, name: str, dtype: np.dtype, *shape: int) -> DeviceArray:
        """The array called `name`; at the same address as long as it need not grow."""
        self._kept.pop(name, None)  # it may be written
        return DeviceArray(self._address(name, dtype.itemsize * math.prod(shape)), dtype, shape)

    def upload(self, name: str, array: np.ndarray[Any, Any]) -> DeviceArray:
        """A host array's values as the work array called `name`."""
        to = self.array(name, array.dtype, *array.shape)
        self._gpu.upload(to.address, array)
        return to

    def keep(self, name: str, array: np.ndarray[Any, Any]) -> DeviceArray:
        """The same, for kernels that only read it: a few values that are there already are not copied again.

        Prompts of one length have the same positions and the same tiles, and each copy lets the GPU begin later.
        """
        if array.nbytes > _COMPARED:
            return self.upload(name, array)
        there, to = self._kept.get(name), self.array(name, array.dtype, *array.shape)
        wanted = self.generation, array.tobytes()
        if there != wanted:
            self._gpu.upload(to.address, array)
        self._kept[name] = wanted
        return to

    def _address(self, name: str, nbytes: int) -> int:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            if buffer is not None:
                buffer.close(self._gpu.stream)
                del self._buffers[name]
                self.generation += 1
            buffer = self._buffers[name] = self._gpu.allocate(nbytes, f"work buffer {name!r}")
            self._gpu.zero(int(buffer.handle), buffer.size)
        return int(buffer.handle)

    def close(self) -> None:
        """Free all of it."""
        for buffer in self._buffers.values():
            buffer.close(self._gpu.stream)
        self._buffers.clear()
        self._kept.clear()


class Downloads:
    """Copies to the host that are waited for later, through page-locked buffers in turn: one more than the batches that
    are started before one is waited for."""

    def __init__(self, gpu: Gpu, ahead: int = 1) -> None:
        self._gpu, self._next = gpu, 0
        self._buffers: list[tuple[Any, int]] = [(None, 0)] * (ahead + 1)

    def start(self, to: np.ndarray[Any, Any], source: DeviceArray) -> Callable[[], None]:
        """Have an array copied once all launched so far has run. The function returned waits and fills `to`.

        It must be called before its buffer's turn comes again.
        """
        which, self._next = self._next, (self._next + 1) % len(self._buffers)
        driver, (host, room) = self._gpu.driver, self._buffers[which]
        if room < to.nbytes:
            self._free(which)
            host = self._gpu.locked(to.nbytes)
            self._buffers[which] = host, to.nbytes
        check(driver.cuMemcpyDtoHAsync(int(host), source.address, to.nbytes, self._gpu.stream.handle))
        landed = self._gpu.stream.record()

        def wait() -> None:
            landed.sync()
            ctypes.memmove(to.ctypes.data, int(host), to.nbytes)

        return wait

    def _free(self, which: int) -> None:
        host, room = self._buffers[which]
        if room:
            self._gpu.driver.cuMemFreeHost(host)
        self._buffers[which] = None, 0

    def close(self) -> None:
        """Free the buffers, once nothing is copied into them any more."""
        self._gpu.driver.cuStreamSynchronize(self._gpu.stream.handle)
        for which in range(len(self._buffers)):
            self._free(which)
