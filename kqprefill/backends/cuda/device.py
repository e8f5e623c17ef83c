"""The GPU: opened through cuda.core, its failures turned into one clear line."""

from contextlib import contextmanager
from threading import Lock

from ...errors import BackendError

_importing = Lock()
_OLDEST = (8, 0)  # cp.async and mma.m16n8k16
_OLDEST_DRIVER = 13000  # its CUDA version: what cuda-python 13 and NVRTC 13's CUBINs ask for


def import_cuda():
    """cuda.core and cuda.bindings.driver. Raises BackendError where cuda-python is not installed or finds no driver."""
    try:
        with _importing:  # cuda.core fills its namespace by hand: a second thread may see it half full
            import cuda.core as core
            from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"cuda-python cannot be imported ({error}); install it with pip install 'cuda-python>=13'"
        ) from None
    return core, driver


@contextmanager
def cuda_errors(doing):
    """Turn a CUDA failure inside the block into a BackendError that says what was being done."""
    from cuda.core._utils.cuda_utils import CUDAError, NVRTCError

    try:
        yield
    except (CUDAError, NVRTCError, RuntimeError) as error:  # RuntimeError: a CUDA library is not installed
        text = " ".join(str(error).split())
        if "OUT_OF_MEMORY" in text:
            text = "the GPU is out of memory"
        raise BackendError(f"{doing}: {text}") from error


def check(result):
    """The value of a cuda.bindings call, whose first element is its error code. Raises cuda.core's CUDAError."""
    from cuda.core._utils.cuda_utils import handle_return

    return handle_return(result)


class Gpu:
    """One CUDA device made current, with the stream that everything runs on and the pool that everything lives in.

    Raises BackendError where there is no driver, no such device, or one older than compute capability 8.0.
    """

    def __init__(self, index):
        core, self.driver = import_cuda()
        with cuda_errors("no usable NVIDIA GPU"):
            check(self.driver.cuInit(0))
            version = check(self.driver.cuDriverGetVersion())
            if version < _OLDEST_DRIVER:
                raise BackendError(
                    f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}; 13.0 (driver 580) or later is needed"
                )
            count = check(self.driver.cuDeviceGetCount())
            if not 0 <= index < count:
                raise BackendError(f"there is no CUDA device {index}; this machine has {count} (numbered from 0)")
            device = core.Device(index)
            device.set_current()
        self.core, self.device, self.index = core, device, index
        capability = device.compute_capability
        self.capability = (capability.major, capability.minor)
        self.name = device.name
        if self.capability < _OLDEST:
            raise BackendError(
                f"{self.name} has compute capability {capability.major}.{capability.minor}; 8.0 or later is needed"
            )
        self.multiprocessors = device.properties.multiprocessor_count
        properties = device.properties
        self.clock = properties.clock_rate * 1e3  # Hz, the highest
        self.memory_rate = 2e3 * properties.memory_clock_rate * properties.global_memory_bus_width / 8  # bytes a second
        self.shared_memory = device.properties.max_shared_memory_per_block_optin  # bytes
        with cuda_errors(f"opening {self.name}"):
            self.stream = device.create_stream()
            self.pool = core.DeviceMemoryResource(device)
            high = self.driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_HIGH
            check(self.driver.cuMemPoolSetAttribute(self.pool.handle, high, self.driver.cuuint64_t(0)))

    def allocate(self, nbytes, what):
        """Device memory (cuda.core.Buffer), for `what` if it fails. Raises BackendError."""
        doing = f"allocating {nbytes / 2**20:.0f} MiB of GPU memory for {what}"
        with cuda_errors(doing):
            try:
                return self.pool.allocate(max(nbytes, 256), stream=self.stream)
            except MemoryError:  # elsewhere it is the host's, and says so
                raise BackendError(f"{doing}: the GPU is out of memory") from None

    def upload(self, address, array, stream=None):
        """Copy a host array to a device address, in the order of the stream (this GPU's own unless given). An array in
        pageable memory may be changed once this returns; one in page-locked memory when the stream has got there."""
        check(self.driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, (stream or self.stream).handle))

    def download(self, array, address):
        """Copy from a device address into a host array; waits for all that was launched before it."""
        check(self.driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self.stream.handle))
        self.stream.sync()

    def zero(self, address, nbytes):
        check(self.driver.cuMemsetD8Async(address, 0, nbytes, self.stream.handle))

    def memory(self):
        """(free, all) bytes of the device's memory, whoever holds the rest."""
        return check(self.driver.cuMemGetInfo())

    def bus_rate(self):
        """Bytes a second from page-locked host memory, measured."""
        nbytes, timing = 32 << 20, self.core.EventOptions(timing_enabled=True)
        host, buffer = check(self.driver.cuMemHostAlloc(nbytes, 0)), self.allocate(nbytes, "measuring the bus")
        marks = []
        for _ in range(3):  # the first wakes the bus
            marks.append(self.stream.record(options=timing))
            check(self.driver.cuMemcpyHtoDAsync(int(buffer.handle), host, nbytes, self.stream.handle))
        marks.append(self.stream.record(options=timing))
        marks[-1].sync()
        buffer.close(self.stream)
        self.driver.cuMemFreeHost(host)
        return nbytes / ((marks[-1] - marks[-2]) / 1e3)

    def memory_peak(self):
        """The most bytes held since this was opened."""
        return self.pool.attributes.used_mem_high

    def close(self):
        """Give everything back; quietly, if the device has failed already."""
        from cuda.core._utils.cuda_utils import CUDAError

        try:
            self.stream.sync()
            self.pool.close()
            self.stream.close()
        except CUDAError:
            pass
