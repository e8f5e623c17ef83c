"""Work arrays: what is uploaded to them, and when it need not be."""

import numpy as np
import pytest

from host_gpu import HostGpu, on_host
from kqprefill.backends.cuda.device.workspace import Workspace


@pytest.fixture
def gpu():
    """Its uploads are counted."""
    gpu = HostGpu()
    upload, gpu.uploads = gpu.upload, 0

    def counted(address, array, stream=None):
        gpu.uploads += 1
        upload(address, array, stream)

    gpu.upload = counted
    return gpu


def test_what_is_there_is_not_copied_again(gpu):
    work, values = Workspace(gpu), np.arange(7, dtype=np.int32)
    first = work.keep("positions", values)
    again = work.keep("positions", values.copy())
    assert (gpu.uploads, again.address) == (1, first.address)
    changed = values + 1
    assert np.array_equal(on_host(work.keep("positions", changed)), changed) and gpu.uploads == 2
    shorter = work.keep("positions", changed[:3])
    assert np.array_equal(on_host(shorter), changed[:3]) and gpu.uploads == 3
    work.keep("others", changed[:3])
    assert gpu.uploads == 4


def test_what_may_have_been_written_is_copied_again(gpu):
    work, values = Workspace(gpu), np.arange(7, dtype=np.int32)
    on_host(work.keep("rows", values))
    memory = work.array("rows", values.dtype, 7)
    gpu.zero(memory.address, values.nbytes)
    assert np.array_equal(on_host(work.keep("rows", values)), values) and gpu.uploads == 2


def test_what_has_moved_is_copied_again(gpu):
    work, few, many = Workspace(gpu), np.arange(7, dtype=np.int32), np.arange(1000, dtype=np.int32)
    work.keep("rows", few)
    assert np.array_equal(on_host(work.keep("rows", many)), many)
    assert np.array_equal(on_host(work.keep("rows", few)), few)
    work.close()
    assert np.array_equal(on_host(work.keep("rows", few)), few) and gpu.uploads == 4


def test_large_arrays_are_copied_always(gpu):
    work, values = Workspace(gpu), np.zeros(1 << 15, np.int32)
    for _ in range(2):
        assert np.array_equal(on_host(work.keep("rows", values)), values)
    assert gpu.uploads == 2
