"""Compiled programs on one GPU, and the launches of their kernels by the names of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import ctypes
import os
from typing import Any, Protocol

from ....core import Progress, no_progress
from .compiler import KernelCache, Program, Target
from .gpu import Gpu, check
from .signatures import Argument, Signature, signatures_of

Grid = int | tuple[int, ...]
_EARLY_LAUNCHES = (9, 0)  # the first compute capability with programmatic dependent launch


class Launches(Protocol):
    """What the ops launch through: a Launcher, or the recorder that a rehearsal has in its place.

    overlap: whether a launch may begin before the one before it has ended, where the GPU has such launches
    (kernels/include/types.cuh: begin_kernel).
    """

    overlap: bool

    def launch(self, program: Program, kernel: str, grid: Grid, **arguments: Argument) -> None:
        """Launch a kernel of a program over that many blocks; each argument is given by its parameter's name."""

    def fence(self) -> None:
        """The next launch begins when all before it has ended, whatever `overlap` says."""


@contextmanager
def begun_early(launcher: Launches) -> Iterator[None]:
    """Launches within the block may begin before the one before them has ended, however small the batch: kernels whose
    few blocks do not gather on the first multiprocessors that have room."""
    overlap = launcher.overlap
    launcher.overlap = True
    try:
        yield
    finally:
        launcher.overlap = overlap


class Launcher:
    """Compiles, loads and launches (see Launches) on one GPU."""

    def __init__(self, gpu: Gpu, target: Target, cache: KernelCache | None = None) -> None:
        self._gpu, self._target, self._cache = gpu, target, cache or KernelCache()
        self._modules: dict[Program, Any] = {}
        self._kernels: dict[tuple[Program, str], _LoadedKernel] = {}
        self._configs: dict[tuple[Grid, int, int, bool], Any] = {}
        self._upcoming: Callable[[], Iterable[Program]] = tuple
        self._progress: Progress = no_progress
        self._fenced = False
        self._may_overlap = gpu.capability >= _EARLY_LAUNCHES
        self.overlap = False

    def prepare(self, programs: Iterable[Program], progress: Progress) -> None:
        """Compile (in parallel) or fetch what is not loaded yet, and load it; progress hears
        "compile"."""
        missing = [program for program in dict.fromkeys(programs) if program not in self._modules]
        if not missing:
            return
        load = getattr(self._gpu.core.ObjectCode, f"from_{self._target.code_type}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda program: self._cache.get(program, self._target)[0], missing)
            for done, (program, code) in enumerate(zip(missing, compiled), 1):
                self._modules[program] = load(code)
                progress("compile", done, len(missing))

    @contextmanager
    def expecting(self, upcoming: Callable[[], Iterable[Program]], progress: Progress) -> Iterator[None]:
        """Within the block, the first launch of a program that is not loaded has upcoming()'s compiled with it."""
        self._upcoming, self._progress = upcoming, progress
        try:
            yield
        finally:
            self._upcoming, self._progress = tuple, no_progress

    def fence(self) -> None:
        self._fenced = True

    def launch(self, program: Program, kernel: str, grid: Grid, **arguments: Argument) -> None:
        loaded = self._kernels.get((program, kernel)) or self._load(program, kernel)
        overlap = self._may_overlap and self.overlap and not self._fenced
        self._fenced = False
        key = grid, loaded.threads, program.shared_bytes, overlap
        config = self._configs.get(key) or self._configure(key)
        loaded.signature.packer.pack_into(loaded.values, 0, *loaded.signature.values(arguments))
        (status,) = self._gpu.driver.cuLaunchKernelEx(config, loaded.function, loaded.addresses, 0)
        if status:
            check((status,))

    def _load(self, program: Program, kernel: str) -> _LoadedKernel:
        if program not in self._modules:
            self.prepare([program, *self._upcoming()], self._progress)
        handle = self._modules[program].get_kernel(kernel)
        loaded = self._kernels[program, kernel] = _LoadedKernel(self._gpu, program, kernel, handle)
        return loaded

    def _configure(self, key: tuple[Grid, int, int, bool]) -> Any:
        grid, threads, shared_bytes, overlap = key
        driver = self._gpu.driver
        config = self._configs[key] = driver.CUlaunchConfig()
        blocks = (grid,) if isinstance(grid, int) else grid
        config.gridDimX, config.gridDimY, config.gridDimZ = (*blocks, 1, 1)[:3]
        config.blockDimY = config.blockDimZ = 1
        config.blockDimX, config.sharedMemBytes = threads, shared_bytes
        config.hStream = self._gpu.stream.handle
        if overlap:
            value = driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        return config


class _LoadedKernel:
    """A kernel, and the host memory that its arguments are written to for a launch: eight bytes each, and their
    addresses."""

    def __init__(self, gpu: Gpu, program: Program, name: str, kernel: Any) -> None:
        self.signature, self.threads = signatures_of(program.source)[name], program.threads_of(name)
        _check_code(program, self.signature, kernel)
        count = len(self.signature.parameters)
        self.values = ctypes.create_string_buffer(8 * max(1, count))
        base = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_uint64 * max(1, count))(*(base + 8 * i for i in range(count)))
        self.addresses = ctypes.addressof(self._pointers)
        self.function = gpu.driver.CUfunction(int(kernel.handle))
        if program.shared_bytes > 48 << 10:
            attribute = gpu.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = gpu.driver.CUdevice(gpu.index)
            check(gpu.driver.cuKernelSetAttribute(attribute, program.shared_bytes, kernel.handle, device))


def _check_code(program: Program, signature: Signature, kernel: Any) -> None:
    """Hold what was read from the source against the machine code. Raises TypeError where they differ."""
    compiled = [int(size) for _, size in kernel.arguments_info]
    if compiled != [parameter.nbytes for parameter in signature.parameters]:
        raise TypeError(f"{program.source}: {signature.kernel} was compiled with parameters of {compiled} bytes")
