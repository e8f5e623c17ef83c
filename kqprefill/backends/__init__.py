"""Backends: the same ops, in NumPy (the reference) and in CUDA."""

from ..errors import BackendError, InputError

NAMES = ("auto", "cpu", "cuda")


def open_backend(name, device, warn):
    """The backend called `name`. "auto" takes CUDA where it can be used and says through warn(str) where it cannot.

    Raises BackendError where "cuda" is asked for and unusable, InputError for an unknown name.
    """
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if name != "cpu":
        try:
            from .cuda.backend import CudaBackend

            return CudaBackend(device)
        except BackendError as error:
            if name == "cuda":
                raise
            warn(f"running on the CPU: {error}")
    from .cpu.backend import CpuBackend

    return CpuBackend()
