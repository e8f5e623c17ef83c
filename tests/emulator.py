"""The CUDA kernels on the host, the portable ones and Hopper's: compiled by g++ over emulator/*.hpp, and launched by
the ops as on a GPU.

It is slow, and shows nothing of how fast anything is. Races within a block show where threads take other turns (the
environment's KQ_EMULATED_ORDER, see threads.hpp), but for those with tensor copies and with wgmma, which are done at
once, and in arrays of `__shared__` that still hold what the launch before has left. It needs g++ and an x86-64
processor with AVX2.
"""

import ctypes
from dataclasses import replace
import hashlib
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
from typing import ClassVar

import numpy as np

from host_gpu import HostGpu
from kqprefill.backends.cuda.device.arrays import UINT8, DeviceArray
from kqprefill.backends.cuda.device.codebooks import definitions
from kqprefill.backends.cuda.device.compiler import kernel_folder
from kqprefill.backends.cuda.device.signatures import signatures_of
from kqprefill.backends.cuda.device.workspace import Downloads, Workspace
from kqprefill.backends.cuda.gemm.tensor_maps import TensorMaps
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.kv_cache import DeviceCache
from kqprefill.backends.cuda.ops.batch import Residual, received
from kqprefill.backends.cuda.ops.context import Context
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.backends.cuda.state_access import DeviceStates
from kqprefill.backends.cuda.weights.matrix import matrix_of
from kqprefill.backends.cuda.weights.small_arrays import SmallArrays
from kqprefill.backends.cuda.weights.staging import unpack
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model

# One after another.
SHIM = "emulator/threads host/words emulator/arithmetic emulator/matrix_units emulator/hopper emulator/launches".split()
IN_ITS_PLACE = ("types.cuh", "ptx.cuh")  # of which SHIM stands in the place
# -fno-gnu-unique: static variables of inline functions, which are shared memory here, are each program's own, not those
# of the first program that a process loads, which may be shorter.
OPTIONS = (
    "-std=c++20 -O1 -mf16c -mfma -mavx2 -ffp-contract=off -fno-strict-aliasing -fno-gnu-unique -w -shared -fPIC".split()
)
MULTIPROCESSORS = 4


def why_not():
    """Why kernels cannot be emulated here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    missing = {"f16c", "fma", "avx2"} - set(flags[1].split() if flags else ())
    return f"no {', '.join(sorted(missing))} in this processor" if missing else None


def _flat(path, seen):
    """A .cu file's text with its includes in place, each once."""
    if path in seen or path.name in IN_ITS_PLACE:
        return ""
    seen.add(path)
    if path.name == "sm90.cuh":  # of which there are the barriers' rings in the place
        return _flat(path.with_name("barriers.cuh"), seen)
    lines = []
    for line in path.read_text().splitlines():
        match = re.match(r'\s*#include\s+"([^"]+)"', line)
        lines.append(_flat((path.parent / match[1]).resolve(), seen) if match else line)
    return "\n".join(line for line in lines if line.strip() != "#pragma once")


def _source(program):
    """A program in C++."""
    names = [name for key, value in program.constants if key in ("FORMAT", "FORMATS") for name in value.split(",")]
    text = definitions(names) + _flat((kernel_folder() / program.source).resolve(), set())
    text = re.sub(r"extern __shared__ (__align__\(\d+\) )?uint8_t shared\[\];", "uint8_t* shared = own_memory();", text)
    for has in (r"^struct Barrier \{.*?^\};", r"^__device__ __forceinline__ void fence_barrier_init\(\) \{.*?^\}"):
        text = re.sub(has, "", text, flags=re.S | re.M)  # SHIM has it
    text = text.replace("__shared__", "static")
    defines = "".join(f"#define {name} {value}\n" for name, value in program.defines)
    constants = dict(program.constants)
    cluster, kernels = constants.get("CLUSTER", 1), set(signatures_of(program.source))
    if "ACTIVATED" in constants:  # a product: of one kind, but that gemm_sm80.cu has two of them in one program
        gated = {"0": {"gemm_linear"}, "1": {"gemm_gated"}, None: {"gemm_linear", "gemm_gated"}}
        own = gated[constants.get("GATED")]
        kernels = {"gemm_activated"} if constants["ACTIVATED"] == "1" else own
        kernels = {"gemm_heads"} if constants.get("HEAD_DIM", "0") != "0" else kernels
    if "ROW_THREADS" in constants:
        normed = {"rms_norm_rounded", "combine_rms_norm_rounded"}
        kernels = normed if constants["NORMED"] == "1" else {"round_rows"}
    launches = "".join(
        f'extern "C" void launch_{kernel}(const uint64_t* values, unsigned x, unsigned y, unsigned z, unsigned n) '
        f"{{ launch({kernel}, values, {{x, y, z}}, n, {cluster}); }}\n"
        for kernel in sorted(kernels)
    )
    shim = "\n".join((Path(__file__).parent / f"{part}.hpp").read_text() for part in SHIM)
    return f"{shim}\n{defines}{text}\n{launches}"


class Emulator:
    """Launches (device/launcher.py) on the host."""

    overlap = False
    _loaded: ClassVar = {}  # what has been compiled, by program

    def __init__(self):
        self._folder = Path(os.environ.get("KQPREFILL_CACHE_DIR", tempfile.gettempdir())) / f"emulator-{os.getuid()}"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        assert self._folder.stat().st_uid == os.getuid()

    def fence(self):
        pass

    def launch(self, program, kernel, grid, **arguments):
        signature = signatures_of(program.source)[kernel]
        signature.check(arguments)
        values = signature.packer.pack(*signature.values(arguments))
        x, y, z = (*np.atleast_1d(grid).tolist(), 1, 1)[:3]
        library = self._loaded.get(program) or self._load(program)
        getattr(library, f"launch_{kernel}")(values, x, y, z, program.threads_of(kernel))

    def _load(self, program):
        source = _source(program)
        key = "\n".join((*OPTIONS, source))
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not path.exists():
            made = Path(tempfile.mkdtemp(dir=self._folder))
            (made / "kernel.cpp").write_text(source)
            subprocess.run(["g++", *OPTIONS, "-o", made / "kernel.so", made / "kernel.cpp"], check=True)
            (made / "kernel.so").rename(path)
            shutil.rmtree(made)
        library = self._loaded[program] = ctypes.CDLL(str(path))
        return library


class EmulatedGpu(HostGpu):
    """With the facts that kernels are chosen by."""

    multiprocessors = MULTIPROCESSORS

    def __init__(self, capability, shared_memory):
        super().__init__()
        self.capability, self.shared_memory = capability, shared_memory

    def copy(self, to, source, nbytes):
        ctypes.memmove(to, source, nbytes)


class EmulatedMaps(TensorMaps):
    """Tensor maps as hopper.hpp reads them."""

    def _encode(self, array, box_rows):
        rows, columns = array.shape
        own = array.address, rows, columns, array.row_bytes, box_rows, array.dtype.itemsize
        return np.array([*own, *[0] * 10], np.uint64)


class EmulatedWeights:
    """A model's matrices, as WeightsOnDevice has them."""

    streaming = False
    halves = None

    def __init__(self, gpu, launcher, host_embedding=False, precision="exact"):
        self._gpu, self._launcher, self._host_embedding, self.precision = gpu, launcher, host_embedding, precision
        self._held, self._matrices = [], {}

    def matrix(self, weight):
        tensor = weight.tensor
        if tensor.name not in self._matrices:
            matrix = matrix_of(tensor, 0, self.precision)
            buffer = self._gpu.allocate(matrix.nbytes, tensor.name)
            raw = np.ascontiguousarray(tensor.data).reshape(matrix.rows, -1).view(np.uint8)
            self._held.append(buffer)
            matrix = replace(matrix, address=buffer.handle)
            unpack(self._launcher, matrix, 0, DeviceArray(raw.ctypes.data, UINT8, raw.shape), self._scratch(matrix))
            self._matrices[tensor.name] = matrix
        return self._matrices[tensor.name]

    def _scratch(self, matrix):
        """Where a matrix in int8 is made."""
        buffer = self._gpu.allocate(replace(matrix, int8=False).nbytes, "scratch")
        self._held.append(buffer)
        return buffer.handle

    def on_host(self, weight):
        return self._host_embedding or weight.name == "per_layer_token_embd.weight"

    def host_rows(self, weight, rows):
        return np.ascontiguousarray(weight.tensor.data[rows]).view(np.uint8)

    def begin_layer(self, index):
        pass


class _Apart:
    """A Workspace's arrays under names of one's own."""

    def __init__(self, work, name):
        self._work, self._name = work, name

    def array(self, name, dtype, *shape):
        return self._work.array(f"{self._name}: {name}", dtype, *shape)

    def upload(self, name, array):
        return self._work.upload(f"{self._name}: {name}", array)

    def keep(self, name, array):
        return self._work.keep(f"{self._name}: {name}", array)


class EmulatedModel:
    """A model whose batches run on emulated kernels: Hopper's own, or the portable ones with so many bytes of shared
    memory for a block."""

    def __init__(self, path, shared_memory=99 << 10, hopper=False, precision="exact"):
        self.file = GGUFFile(str(path))
        self.family = read_model(self.file)
        capability, shared_memory = ((9, 0), 227 << 10) if hopper else ((8, 0), shared_memory)
        self.gpu, launcher = EmulatedGpu(capability, shared_memory), Emulator()
        kernel_set = kernel_set_of(self.gpu.capability)
        self.context = Context.of(
            self.gpu,
            kernel_set,
            launcher,
            Workspace(self.gpu),
            Downloads(self.gpu),
            EmulatedMaps(self.gpu),
            EmulatedWeights(self.gpu, launcher, precision=precision),
            SmallArrays(self.gpu),
        )

    def new_cache(self, capacity):
        return DeviceCache(self.gpu, self.family.layer_states, capacity)

    def states(self, cache):
        """The StateAccess to a cache."""
        return DeviceStates(self.context, self.family, cache)

    def run_in_shares(self, batch, first):
        """The logits of a batch whose layers from number `first` on have other work arrays, as on another device."""
        count, x = len(self.family.blocks), None
        for layers, name in ((range(first), "one"), (range(first, count), "other")):
            ops = CudaOps(replace(self.context, work=_Apart(self.context.work, name)), self.family, batch, None)
            if x is not None:
                values = received(ops, self.family)
                self.gpu.copy(values.address, x.values.address, values.nbytes)
                x = Residual(values, x.bound)
            x = self.family.forward(ops, layers=layers, x=x)
        return self.family.finish(ops, x, "all")().logits

    def run(self, batch, logits="all", cache=None):
        """What the head gives of a batch."""
        ops = CudaOps(self.context, self.family, batch, cache)
        result = self.family.finish(ops, self.family.forward(ops), logits)()
        if cache is not None:
            cache.length += len(batch.tokens)
        return result

    def close(self):
        self.file.close()
