"""In place of a GPU: memory of the host, where all that is asked for is done at once."""

import ctypes
from types import SimpleNamespace

from cuda.bindings.driver import CUresult
import numpy as np

OK = CUresult.CUDA_SUCCESS


class Event:
    def sync(self):
        pass


class Stream(Event):
    handle = 0

    def wait(self, other):
        pass

    def record(self, event=None):
        return event or Event()

    def close(self):
        pass


class Buffer:
    def __init__(self, nbytes):
        self.memory = np.full(nbytes, 0xFF, np.uint8)  # halves that are NaN
        self.handle, self.size = self.memory.ctypes.data, nbytes

    def close(self, stream):
        self.memory[:] = 0xFF


class HostGpu:
    """In place of a Gpu: its memory is the host's, and all that is asked for is done at once."""

    capturing = False

    def __init__(self):
        self.stream, self.blocks = Stream(), {}
        self.device = SimpleNamespace(create_stream=Stream, create_event=Event, set_current=lambda: None)
        self.driver = SimpleNamespace(
            cuMemFreeHost=lambda host: self.blocks.pop(int(host)),
            cuMemcpyDtoHAsync=lambda to, source, nbytes, stream: (ctypes.memmove(to, source, nbytes), (OK,))[1],
            cuMemcpyHtoDAsync=lambda to, source, nbytes, stream: (ctypes.memmove(to, source, nbytes), (OK,))[1],
            cuMemHostUnregister=lambda *args: (OK,),
            cuStreamSynchronize=lambda *args: (OK,),
        )

    def locked(self, nbytes, for_all=False):
        memory = np.empty(nbytes, np.uint8)
        self.blocks[memory.ctypes.data] = memory
        return memory.ctypes.data

    def lock(self, address, nbytes, read_only=False):
        return OK

    def allocate(self, nbytes, what):
        return Buffer(nbytes)

    def zero(self, address, nbytes):
        ctypes.memset(address, 0, nbytes)

    def upload(self, address, array, stream=None):
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def download(self, array, address):
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


def on_host(array):
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)
