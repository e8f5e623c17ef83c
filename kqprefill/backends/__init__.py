"""Backends: the same ops, in NumPy (the reference) and in CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ..errors import BackendError, InputError
from .devices import Devices, device_numbers

if TYPE_CHECKING:
    from ..models.precision import Precision
    from .base import Backend
    from .budget import Budget

NAMES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "portable")
PRECISIONS = ("exact", "int8")  # those of kqprefill.models.precision, which NumPy comes with


def open_backend(name: str, device: Devices, kernels: str, warn: Callable[[str], None]) -> Backend:
    """The backend called `name`. "auto" takes CUDA where it can be used and says through warn(str) where it cannot.

    device: the CUDA device's number, or several (backends/devices.py). kernels: "auto", or "portable" for those that
    run on every supported GPU. Raises BackendError where "cuda" is asked for and unusable, InputError for an unknown
    name.
    """
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if kernels not in KERNELS:
        raise InputError(f"kernels {kernels!r} are unknown; choose one of {', '.join(KERNELS)}")
    numbers = device_numbers(device)
    if name != "cpu":
        try:
            return _cuda(numbers, kernels)
        except BackendError as error:
            if name == "cuda":
                raise
            warn(f"running on the CPU: {error}")
    from .cpu.backend import CpuBackend

    return CpuBackend()


def _cuda(numbers: tuple[int, ...] | None, kernels: str) -> Backend:
    """The backend over those devices, None for all there are."""
    from .cuda.backend import CudaBackend

    if numbers is None:
        from .cuda.device.gpu import device_count

        numbers = tuple(range(device_count()))
    if len(numbers) == 1:
        return CudaBackend(numbers[0], kernels)
    from .cuda.pipeline.backend import Pipeline

    return Pipeline(numbers, kernels)


def precision_called(name: str) -> Precision:
    """The precision of that name. Raises InputError for an unknown one."""
    if name not in PRECISIONS:
        raise InputError(f"precision {name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return cast("Precision", name)


def device_room(name: str, device: Devices, vram: Budget | None) -> int | None:
    """Bytes of device memory that models may take together, of each device: a Budget's, None for all that is free; and
    None where the backend called `name` is the CPU, or no GPU can be used (`open_backend` says why)."""
    if name == "cpu":
        return None
    try:
        from .cuda.device.gpu import Gpu, cuda_errors
        from .cuda.weights.plan import budget_of

        numbers = device_numbers(device)
        gpu = Gpu(numbers[0] if numbers else 0)
        try:
            with cuda_errors("asking for the free memory"):
                return budget_of(gpu, vram)
        finally:
            gpu.close()
    except BackendError:
        return None
