"""Backends: the same ops, in NumPy (the reference) and in CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ..errors import BackendError, InputError

if TYPE_CHECKING:
    from ..models.precision import Precision
    from .base import Backend
    from .budget import Budget

NAMES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "portable")
PRECISIONS = ("exact", "int8")  # those of kqprefill.models.precision, which NumPy comes with


def open_backend(name: str, device: int, kernels: str, warn: Callable[[str], None]) -> Backend:
    """The backend called `name`. "auto" takes CUDA where it can be used and says through warn(str) where it cannot.

    device: the CUDA device's number. kernels: "auto", or "portable" for those that run on every supported GPU. Raises
    BackendError where "cuda" is asked for and unusable, InputError for an unknown name.
    """
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if kernels not in KERNELS:
        raise InputError(f"kernels {kernels!r} are unknown; choose one of {', '.join(KERNELS)}")
    if name != "cpu":
        try:
            from .cuda.backend import CudaBackend

            return CudaBackend(device, kernels)
        except BackendError as error:
            if name == "cuda":
                raise
            warn(f"running on the CPU: {error}")
    from .cpu.backend import CpuBackend

    return CpuBackend()


def precision_called(name: str) -> Precision:
    """The precision of that name. Raises InputError for an unknown one."""
    if name not in PRECISIONS:
        raise InputError(f"precision {name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return cast("Precision", name)


def device_room(name: str, device: int, vram: Budget | None) -> int | None:
    """Bytes of device memory that models may take together: a Budget's, None for all that is free; and None where the
    backend called `name` is the CPU, or no GPU can be used (`open_backend` says why)."""
    if name == "cpu":
        return None
    try:
        from .cuda.device.gpu import Gpu, cuda_errors
        from .cuda.weights.plan import budget_of

        gpu = Gpu(device)
        try:
            with cuda_errors("asking for the free memory"):
                return budget_of(gpu, vram)
        finally:
            gpu.close()
    except BackendError:
        return None
