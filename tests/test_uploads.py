"""Host memory on its way to the GPU: page-locked blocks are not written to, and pages not unlocked, while they are
read."""

import ctypes
import gc
import mmap
from types import SimpleNamespace
import weakref

from cuda.bindings import driver as cuda
import numpy as np

from kqprefill.backends.cuda.device.gpu import _Uploads
from kqprefill.backends.cuda.weights import host_pages

SUCCESS = cuda.CUresult.CUDA_SUCCESS


class SlowGpu:
    """A GPU whose stream does nothing until somebody waits for an event of it; device memory is host memory."""

    def __init__(self):
        self.work, self.blocks, self.waited, self.freed = [], {}, 0, 0
        self.driver = SimpleNamespace(cuMemcpyHtoDAsync=self.copy, cuMemFreeHost=self.free)
        self.device = SimpleNamespace(create_event=lambda: SlowEvent(self))
        self.stream = SimpleNamespace(record=lambda event: event.record(), handle=0)

    def locked(self, nbytes):
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def copy(self, to, source, nbytes, stream):
        self.work.append(lambda: ctypes.memmove(to, source, nbytes))
        return (SUCCESS,)

    def free(self, host):
        self.freed += 1
        del self.blocks[host]

    def run(self, until):
        for step in self.work[:until]:
            step()
        self.work[:until] = [lambda: None] * len(self.work[:until])


class SlowEvent:
    def __init__(self, gpu):
        self.gpu, self.at, self.is_done = gpu, 0, True

    def record(self):
        self.at, self.is_done = len(self.gpu.work), False
        self.gpu.work.append(lambda: setattr(self, "is_done", True))

    def sync(self):
        self.gpu.waited += 1
        self.gpu.run(self.at + 1)


def test_what_comes_is_what_was_there_when_it_was_sent(rng):
    gpu = SlowGpu()
    uploads, sent = _Uploads(gpu), []
    for nbytes in [
        100_000,
        40 << 20,
        1 << 20,
        70_000,
        33 << 20,
        16 << 20,
        17 << 20,
        *rng.integers(1 << 16, 8 << 20, 20),
    ]:
        array = rng.integers(0, 256, int(nbytes), np.uint8)
        to = np.zeros_like(array)
        uploads.start(to.ctypes.data, array)
        sent.append((to, array.copy()))
        array[:] = 0  # it may be changed at once
    assert gpu.waited and sum(len(block) for block in gpu.blocks.values()) <= _Uploads._MOST + _Uploads._PIECE
    gpu.run(len(gpu.work))
    assert all(np.array_equal(to, array) for to, array in sent)
    held = len(gpu.blocks)
    uploads.close()
    assert gpu.freed == held and not gpu.blocks


def test_blocks_are_used_again_once_they_have_been_read():
    gpu = SlowGpu()
    uploads, array = _Uploads(gpu), np.zeros(200_000, np.uint8)
    to = np.empty_like(array)
    for _ in range(10):
        uploads.start(to.ctypes.data, array)
        gpu.run(len(gpu.work))
    assert len(gpu.blocks) == 1 and not gpu.waited


def test_pages_are_unlocked_after_their_last_copy(monkeypatch, rng):
    """Though the events of their uses are recorded only once several copies have been launched."""
    monkeypatch.setattr(host_pages, "WINDOW", 1 << 16)
    copies, last, unlocked = [0], {}, []
    stream = SimpleNamespace(record=lambda event: setattr(event, "at", copies[0]), handle=0)

    def copy(address, array, stream):
        copies[0] += 1
        last[array.ctypes.data >> 16] = copies[0]

    def unlock(self, window, event):
        unlocked.append((event.at, last[window.begin >> 16]))

    driver = SimpleNamespace(cuStreamSynchronize=lambda handle: None)
    device = SimpleNamespace(set_current=lambda: None, create_event=lambda: SimpleNamespace(at=0))
    monkeypatch.setattr(host_pages.HostPages, "_unlock", unlock)
    gpu = SimpleNamespace(device=device, driver=driver, upload=copy, lock=lambda *_, **__: 0)
    uploader = host_pages.Uploader(gpu, stream, keep=3 << 16)
    memory = np.frombuffer(mmap.mmap(-1, 10 << 16), np.uint8)
    for _ in range(40):
        for _ in range(4):
            begin = int(rng.integers(0, 9 << 16))
            uploader.copy(memory[begin : begin + int(rng.integers(1, 3 << 16))], 0)
        uploader.end_copies()
    while uploader._pages._leaving:  # those that are left stay locked until the stream has ended
        uploader._pages._leaving.popitem()[1].result()
    assert unlocked and all(recorded >= copied for recorded, copied in unlocked)
    uploader.close()


def test_memory_stays_while_it_is_locked():
    """Else the system may put new memory there, which then counts as locked."""
    device = SimpleNamespace(set_current=lambda: None, create_event=lambda: SimpleNamespace(sync=lambda: None))
    driver = SimpleNamespace(cuMemHostUnregister=lambda address: None)
    pages = host_pages.HostPages(SimpleNamespace(device=device, driver=driver, lock=lambda *_, **__: 0), keep=0)
    mapping = mmap.mmap(-1, 1 << 16)
    here = weakref.ref(mapping)
    [(window, _)] = pages.pieces(np.frombuffer(mapping, np.uint8))
    assert pages.lock(window)
    del mapping, window, _
    assert here() is not None
    pages.close()
    gc.collect()
    assert here() is None
