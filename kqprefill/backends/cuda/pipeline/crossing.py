"""The residual stream on its way from one device to the next: from peer to peer where the driver lets the devices reach
each other's memory, else through page-locked host memory."""

from __future__ import annotations

from dataclasses import dataclass
import os
from queue import SimpleQueue
from typing import Any

from ..device.arrays import DeviceArray
from ..device.gpu import Gpu, check
from ..device.laps import Laps
from ..ops.batch import Residual, ResidualBound
from ..weights.plan import CROSSINGS

_ALREADY = "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"
THROUGH_HOST = "KQPREFILL_PEER"  # =0: through host memory in any case, to measure and to test it


@dataclass
class _Slot:
    """Room for a residual stream that waits, of so many bytes from `address` on, and events: it is there; it has been
    taken away."""

    sent: Any
    taken: Any
    address: int = 0
    room: int = 0


@dataclass(frozen=True)
class Parcel:
    """A residual stream that has been sent off."""

    slot: _Slot
    nbytes: int
    bound: ResidualBound | None


class Crossing:
    """The way from one device to another. `send` belongs to the thread of the first, `receive` to that of the second;
    in each of them its own device is current."""

    def __init__(self, source: Gpu, target: Gpu) -> None:
        self._source, self._target = source, target
        # Primary contexts live as long as the process.
        self._contexts = [check(source.driver.cuDevicePrimaryCtxRetain(gpu.index)) for gpu in (target, source)]
        self.peer = os.environ.get(THROUGH_HOST) != "0" and self._reach()
        self.nbytes = 0  # that have been sent
        self._laps, self._received = Laps(source), Laps(target)
        self._slots = [_Slot(source.device.create_event(), None) for _ in range(CROSSINGS)]
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    def send(self, x: Residual) -> Parcel:
        """Launch the copy of a residual stream; waits until the thread of the other device has come so far that there
        is room for it."""
        slot, stream, nbytes = self._free.get(), self._source.stream, x.values.nbytes
        try:
            if slot.taken is not None:
                stream.wait(slot.taken)
            if slot.room < nbytes:
                self._make_room(slot, nbytes)
            self._laps.begin()
            driver, values = self._source.driver, x.values.address
            if not self.peer:
                check(driver.cuMemcpyDtoHAsync(slot.address, values, nbytes, stream.handle))
            elif self._source.index == self._target.index:
                check(driver.cuMemcpyDtoDAsync(slot.address, values, nbytes, stream.handle))
            else:
                there, here = self._contexts
                check(driver.cuMemcpyPeerAsync(slot.address, there, values, here, nbytes, stream.handle))
            stream.record(slot.sent)
            self._laps.end()
        except BaseException:
            self._free.put(slot)
            raise
        self.nbytes += nbytes
        return Parcel(slot, nbytes, x.bound)

    def receive(self, parcel: Parcel, to: DeviceArray) -> ResidualBound | None:
        """Launch what puts it into an array, once it has come; its bound."""
        slot, stream, driver = parcel.slot, self._target.stream, self._target.driver
        assert to.nbytes == parcel.nbytes, "both devices have the same batch"
        stream.wait(slot.sent)
        copy = driver.cuMemcpyDtoDAsync if self.peer else driver.cuMemcpyHtoDAsync
        self._received.begin()
        check(copy(to.address, slot.address, parcel.nbytes, stream.handle))
        self._received.end()
        if slot.taken is None:
            slot.taken = self._target.device.create_event()
        stream.record(slot.taken)
        return parcel.bound

    def give_back(self, parcel: Parcel) -> None:
        """The room may be used again: the parcel has been received, or never will be."""
        self._free.put(parcel.slot)

    def seconds(self) -> float:
        """What copying took of both streams."""
        return self._laps.seconds() + self._received.seconds()

    def _reach(self) -> bool:
        """Let the first device write to the second one's memory; whether it can."""
        source, target, driver = self._source.index, self._target.index, self._source.driver
        if source == target:
            return True
        if not check(driver.cuDeviceCanAccessPeer(source, target)):
            return False
        (status,) = driver.cuCtxEnablePeerAccess(self._contexts[0], 0)
        return status.name in ("CUDA_SUCCESS", _ALREADY)

    def _make_room(self, slot: _Slot, nbytes: int) -> None:
        self._drop(slot)
        if self.peer:  # plain memory, which other devices reach; a pool's they do not
            self._target.device.set_current()
            try:
                slot.address = int(check(self._source.driver.cuMemAlloc(nbytes)))
            finally:
                self._source.device.set_current()
        else:
            slot.address = self._source.locked(nbytes, for_all=True)
        slot.room = nbytes

    def _drop(self, slot: _Slot) -> None:
        """Free a slot's memory, once nothing reads it any more."""
        if slot.room:
            if slot.taken is not None:
                slot.taken.sync()
            free = self._source.driver.cuMemFree if self.peer else self._source.driver.cuMemFreeHost
            free(slot.address)
        slot.address = slot.room = 0

    def close(self) -> None:
        """Free the room; in the thread of the first device, when nothing is on its way."""
        for slot in self._slots:
            slot.sent.sync()
            self._drop(slot)
