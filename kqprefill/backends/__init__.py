"""Backends: the same ops, in NumPy (the reference) and in CUDA."""

from ..errors import BackendError, InputError

NAMES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "portable")


def open_backend(name, device, kernels, warn):
    """The backend called `name`. "auto" takes CUDA where it can be used and says through warn(str) where it cannot.

    kernels: "auto", or "portable" for those that run on every supported GPU. Raises BackendError where "cuda" is asked
    for and unusable, InputError for an unknown name.
    """
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if kernels not in KERNELS:
        raise InputError(f"kernels {kernels!r} are unknown; choose one of {', '.join(KERNELS)}")
    if name != "cpu":
        try:
            from .cuda.backend import CudaBackend

            return CudaBackend(device, portable=kernels == "portable")
        except BackendError as error:
            if name == "cuda":
                raise
            warn(f"running on the CPU: {error}")
    from .cpu.backend import CpuBackend

    return CpuBackend()
