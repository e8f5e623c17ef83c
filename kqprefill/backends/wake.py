"""Wakes the NVIDIA driver early: initialising it and a context takes 0.2 s, which can pass while Python imports."""

from __future__ import annotations

from collections.abc import Sequence
import ctypes
from threading import Thread


def wake_gpu(backend: str, numbers: Sequence[int]) -> None:
    """Begin to wake the devices, unless the backend is "cpu". Returns at once; failures are for later to report."""
    if backend != "cpu":
        for device in numbers:
            Thread(target=_wake, args=(device,), daemon=True).start()


def _wake(device: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(handle), device) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
