"""The GPU: opened through cuda.core, its failures turned into one clear line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import ctypes
from dataclasses import dataclass
from functools import cache
import re
from threading import Lock
from typing import Any, Protocol

import numpy as np

from ....errors import BackendError

_importing = Lock()
# Two threads page-lock memory at once where a model is loaded on two devices. That was seen to fail
# (CUDA_ERROR_ALREADY_MAPPED), with this lock, too: what was locked had been given back, and its addresses were new
# memory's (host_pages._Window keeps it since).
_locking = Lock()
_OLDEST = (8, 0)  # cp.async and mma.m16n8k16
_OLDEST_DRIVER = 13000  # its CUDA version: what cuda-python 13 and NVRTC 13's CUBINs ask for
_NEEDED = "a GPU needs an NVIDIA driver of 580 or later"


def import_cuda() -> tuple[Any, Any]:
    """cuda.core and cuda.bindings.driver. Raises BackendError where cuda-python is not installed or finds no driver."""
    try:
        with _importing:  # cuda.core fills its namespace by hand: a second thread may see it half full
            from cuda.bindings import driver
            import cuda.core as core
    except ImportError as error:
        raise BackendError(
            f"cuda-python cannot be imported; install it with pip install 'cuda-python>=13' ({_NEEDED})"
        ) from error
    return core, driver


@contextmanager
def cuda_errors(doing: str) -> Iterator[None]:
    """Turn a CUDA failure inside the block into a BackendError that says what was being done."""
    from cuda.core._utils.cuda_utils import CUDAError, NVRTCError

    try:
        yield
    except (CUDAError, NVRTCError, RuntimeError) as error:  # RuntimeError: a CUDA library is not installed
        text = " ".join(str(error).split())
        if "OUT_OF_MEMORY" in text:
            text = "the GPU is out of memory"
        raise BackendError(f"{doing}: {text}") from error


def reporting(doing: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that does the same, its CUDA failures turned into BackendErrors."""

    def reported() -> Any:
        with cuda_errors(doing):
            return call()

    return reported


def _start_driver(driver: Any) -> None:
    """Initialise the driver. Raises BackendError in our own words: this is the first that a machine without a GPU sees
    of us, and the libraries' texts are about their own insides."""
    from cuda.core._utils.cuda_utils import CUDAError

    try:
        check(driver.cuInit(0))
    except RuntimeError as error:  # the library is not there
        raise BackendError(f"there is no NVIDIA driver here; {_NEEDED}") from error
    except CUDAError as error:
        name = re.search(r"CUDA_ERROR_\w+", str(error))
        why = f" ({name[0]})" if name and "NO_DEVICE" not in name[0] else ""
        raise BackendError(f"the NVIDIA driver finds no GPU that can be used{why}; {_NEEDED}") from error


def device_count() -> int:
    """How many CUDA devices there are, at least one. Raises BackendError where none can be used."""
    _, driver = import_cuda()
    _start_driver(driver)
    return int(check(driver.cuDeviceGetCount()))


@cache
def _handle_return() -> Callable[[Any], Any]:
    from cuda.core._utils.cuda_utils import handle_return

    return handle_return  # type: ignore[no-any-return]


def check(result: Any) -> Any:
    """The value of a cuda.bindings call, whose first element is its error code. Raises cuda.core's CUDAError."""
    return _handle_return()(result)


class GpuFacts(Protocol):
    """What is known of a GPU without opening it.

    capability: its compute capability, (9, 0) for Hopper. multiprocessors: how many. shared_memory: bytes that a block
    may have. clock: Hz, the highest. memory_rate: bytes a second.
    """

    @property
    def capability(self) -> tuple[int, int]: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def shared_memory(self) -> int: ...
    @property
    def clock(self) -> float: ...
    @property
    def memory_rate(self) -> float: ...
    def bus_rate(self) -> float:
        """Bytes a second from page-locked host memory."""


class Gpu:
    """One CUDA device made current, with the stream that everything runs on and the pool that everything lives in.

    It has GpuFacts. capturing: whether what is launched goes into a graph, for now. Raises BackendError where there is
    no driver, no such device, or one older than compute capability 8.0.
    """

    capturing = False

    def __init__(self, index: int) -> None:
        core, self.driver = import_cuda()
        _start_driver(self.driver)
        with cuda_errors("no usable NVIDIA GPU"):
            version = check(self.driver.cuDriverGetVersion())
            if version < _OLDEST_DRIVER:
                raise BackendError(
                    f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}; {_NEEDED}, which is for "
                    "CUDA 13.0"
                )
            count = check(self.driver.cuDeviceGetCount())
            if not 0 <= index < count:
                raise BackendError(f"there is no CUDA device {index}; this machine has {count} (numbered from 0)")
            device = core.Device(index)
            device.set_current()
        self.core, self.device, self.index = core, device, index
        capability = device.compute_capability
        self.capability: tuple[int, int] = (capability.major, capability.minor)
        self.name: str = device.name
        if self.capability < _OLDEST:
            raise BackendError(
                f"{self.name} has compute capability {capability.major}.{capability.minor}; 8.0 or later is needed"
            )
        properties = device.properties
        self.multiprocessors: int = properties.multiprocessor_count
        self.clock: float = properties.clock_rate * 1e3
        self.memory_rate: float = 2e3 * properties.memory_clock_rate * properties.global_memory_bus_width / 8
        self.shared_memory: int = properties.max_shared_memory_per_block_optin
        with cuda_errors(f"opening {self.name}"):
            self.stream = device.create_stream()
            self.pool = core.DeviceMemoryResource(device)
            high = self.driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_HIGH
            check(self.driver.cuMemPoolSetAttribute(self.pool.handle, high, self.driver.cuuint64_t(0)))
        self._uploads = _Uploads(self)

    def allocate(self, nbytes: int, what: str) -> Any:
        """Device memory (cuda.core.Buffer), for `what` if it fails. Raises BackendError."""
        doing = f"allocating {nbytes / 2**20:.0f} MiB of GPU memory for {what}"
        with cuda_errors(doing):
            try:
                return self.pool.allocate(max(nbytes, 256), stream=self.stream)
            except MemoryError:  # elsewhere it is the host's, and says so
                raise BackendError(f"{doing}: the GPU is out of memory") from None

    def upload(self, address: int, array: np.ndarray[Any, Any], stream: Any = None) -> None:
        """Copy a host array to a device address, in the order of the stream (this GPU's own unless given).

        Without a stream the array may be changed once this returns; with one, where it is in page-locked memory, when
        the stream has got there.
        """
        assert not self.capturing, "a graph would copy from the host array again each time, wherever that is by then"
        if stream is None and array.nbytes > _Uploads.BY_DRIVER:
            self._uploads.start(address, array)
            return
        check(self.driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, (stream or self.stream).handle))

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Copy from a device address into a host array; waits for all that was launched before it.

        It waits first: such a copy that waits for what was launched keeps other threads from copying meanwhile.
        """
        self.stream.sync()
        check(self.driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self.stream.handle))
        self.stream.sync()

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy device memory, in the order of the stream."""
        check(self.driver.cuMemcpyDtoDAsync(to, source, nbytes, self.stream.handle))

    def zero(self, address: int, nbytes: int) -> None:
        """Set bytes of device memory to zero, in the order of the stream."""
        check(self.driver.cuMemsetD8Async(address, 0, nbytes, self.stream.handle))

    def locked(self, nbytes: int, for_all: bool = False) -> int:
        """The address of new page-locked host memory; for_all: that other devices copy from and to, too. It is freed by
        cuMemFreeHost."""
        flags = self.driver.CU_MEMHOSTALLOC_PORTABLE if for_all else 0
        with _locking:
            return int(check(self.driver.cuMemHostAlloc(nbytes, flags)))

    def lock(self, address: int, nbytes: int, read_only: bool = False) -> Any:
        """Lock pages of host memory in place. Returns the driver's status, which is 0 where it could."""
        flags = self.driver.CU_MEMHOSTREGISTER_READ_ONLY if read_only else 0
        with _locking:
            (status,) = self.driver.cuMemHostRegister(address, nbytes, flags)
        return status

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the device's memory, whoever holds the rest."""
        free, total = check(self.driver.cuMemGetInfo())
        return free, total

    def bus_rate(self) -> float:
        """Bytes a second from page-locked host memory, measured once nothing else uses the bus. The device is current
        then in the thread that asks."""
        self.device.set_current()
        self.device.sync()
        nbytes, timing = 32 << 20, self.core.EventOptions(timing_enabled=True)
        host, buffer = self.locked(nbytes), self.allocate(nbytes, "measuring the bus")
        marks = []
        for _ in range(3):  # the first wakes the bus
            marks.append(self.stream.record(options=timing))
            check(self.driver.cuMemcpyHtoDAsync(int(buffer.handle), host, nbytes, self.stream.handle))
        marks.append(self.stream.record(options=timing))
        marks[-1].sync()
        buffer.close(self.stream)
        self.driver.cuMemFreeHost(host)
        return nbytes / (float(marks[-1] - marks[-2]) / 1e3)

    def memory_peak(self) -> int:
        """The most bytes held since this was opened."""
        return int(self.pool.attributes.used_mem_high)

    def close(self) -> None:
        """Give everything back; quietly, if the device has failed already."""
        from cuda.core._utils.cuda_utils import CUDAError

        try:
            self.stream.sync()
            self._uploads.close()
            self.pool.close()
            self.stream.close()
        except CUDAError:
            pass


@dataclass
class _Block:
    """Page-locked host memory, and the event after which nothing reads it any more."""

    host: int
    room: int
    read: Any


class _Uploads:
    """Copies of pageable arrays on the GPU's stream, through page-locked blocks.

    The driver would make the host wait until the stream has got there: the next batch could not be launched while one
    is computed. It keeps a copy of arrays of at most BY_DRIVER bytes.
    """

    BY_DRIVER = 64 << 10  # bytes (CUDA driver API, "API synchronization behavior")
    _LEAST, _PIECE = 1 << 20, 16 << 20  # bytes of a block
    _MOST = 96 << 20  # bytes of all blocks: two batches' of 32768 tokens

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._blocks: list[_Block] = []  # the one used last comes last

    def start(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Have a contiguous array copied to a device address; it may be changed once this returns."""
        for at in range(0, array.nbytes, self._PIECE):
            nbytes = min(self._PIECE, array.nbytes - at)
            block = self._take(nbytes)
            ctypes.memmove(block.host, array.ctypes.data + at, nbytes)
            check(self._gpu.driver.cuMemcpyHtoDAsync(address + at, block.host, nbytes, self._gpu.stream.handle))
            self._gpu.stream.record(block.read)

    def _take(self, nbytes: int) -> _Block:
        """A block with room for so many bytes that nothing reads."""
        fitting = [block for block in self._blocks if block.room >= nbytes]
        unread = (block for block in fitting if block.read.is_done)
        block = min(unread, key=lambda block: block.room, default=None)
        if block is None and (not fitting or sum(block.room for block in self._blocks) + nbytes <= self._MOST):
            room = max(self._LEAST, 1 << (nbytes - 1).bit_length())
            host = self._gpu.locked(room)
            block = _Block(host, room, self._gpu.device.create_event())
        elif block is None:
            block = fitting[0]
            block.read.sync()
        if block in self._blocks:
            self._blocks.remove(block)
        self._blocks.append(block)
        return block

    def close(self) -> None:
        """Free the blocks, once nothing reads them any more."""
        for block in self._blocks:
            self._gpu.driver.cuMemFreeHost(block.host)
        self._blocks.clear()
