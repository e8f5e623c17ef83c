"""The programs that a model needs on a GPU; compiling, loading and launching their kernels."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
import os

from ...gguf.dequantize import SUPPORTED
from ...gguf.types import GGML
from .compiler import KernelCache, Program, target_of
from .device import check, cuda_errors
from .tiles import HOPPER_TILES, LARGE_TILES, SMALL_TILE, attention_tile, repack_units

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # what we claim to compile for


@cache
def weight_program(ggml_type):
    return Program("weights.cu", (("FORMAT", ggml_type.name), ("REPACK_UNITS", str(repack_units(ggml_type)))))


COMMON = tuple(Program(f"{name}.cu") for name in ("norm", "rope", "scales", "head"))
EXPERTS = Program("experts.cu")


def programs_for(head_dim, ggml_types, hopper):
    """The programs that any model with these heads and weight types needs, its GEMMs apart."""
    return [attention_tile(head_dim, hopper).program, *map(weight_program, sorted(ggml_types)), *COMMON]


def every_program(arch):
    """All programs for an architecture, over the head dimensions in use: what the tests compile."""
    programs = {EXPERTS: None}
    programs |= dict.fromkeys(tile.program(g) for tile in (*LARGE_TILES, SMALL_TILE) for g in (False, True))
    for head_dim in (64, 80, 96, 112, 128, 192, 256):
        for hopper in {False, arch == "sm_90a"}:
            programs.update(dict.fromkeys(programs_for(head_dim, SUPPORTED, hopper)))
    if arch == "sm_90a":
        mixes = [*((t,) for t in sorted(SUPPORTED)), (GGML.Q4_K, GGML.Q6_K)]
        tiles = [(tile, types) for types in mixes for tile in HOPPER_TILES if len(types) == 1 or not tile.gated]
        programs.update(dict.fromkeys(tile.program(types) for tile, types in tiles))
        stacks = [
            ((t,), tile) for t in (GGML.Q4_K, GGML.Q6_K, GGML.MXFP4) for tile in HOPPER_TILES
        ]  # the types of most experts
        programs.update(dict.fromkeys(tile.program(types, grouped=True) for types, tile in stacks))
    return list(programs)


class Kernels:
    """Compiled kernels on one GPU; called to launch."""

    def __init__(self, gpu, cache=None):
        self._gpu = gpu
        self._cache = cache or KernelCache()
        self._modules, self._launchers, self._configs = {}, {}, {}
        self.overlap = False  # whether a launch may begin before the one before it has ended (types.cuh: begin_kernel)
        self._fenced = False

    def prepare(self, programs, progress):
        """Compile (in parallel) or fetch the programs and load them; progress("compile", done, total)."""
        missing = [p for p in programs if p not in self._modules]
        if not missing:
            return
        with cuda_errors("NVRTC"):
            code_type, arch = target_of(self._gpu.capability)
        load = getattr(self._gpu.core.ObjectCode, f"from_{code_type}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, (program, (code, _)) in enumerate(
                zip(missing, pool.map(lambda p: self._cache.get(p, code_type, arch), missing)), 1
            ):
                self._modules[program] = load(code)
                progress("compile", done, len(missing))

    def fence(self):
        """The next launch begins when all before it has ended, whatever `overlap` says."""
        self._fenced = True

    def launch(self, program, name, grid, threads, *args, shared_bytes=0):
        """Launch kernel `name` of a prepared program. Python ints are passed as 64-bit values (addresses), so 32-bit
        arguments must be ctypes' c_int32 and c_float."""
        key = program, name, shared_bytes
        kernel = self._launchers.get(key) or self._get(key)
        overlap = self.overlap and not self._fenced
        self._fenced = False
        config_key = grid, threads, shared_bytes, overlap
        config = self._configs.get(config_key)
        if config is None:
            config = self._gpu.core.LaunchConfig(
                grid=grid,
                block=threads,
                shmem_size=shared_bytes,
                programmatic_stream_serialization=overlap,
            )
            self._configs[config_key] = config
        self._gpu.core.launch(self._gpu.stream, config, kernel, *args)

    def _get(self, key):
        program, name, shared_bytes = key
        if program not in self._modules:
            self.prepare([program], lambda *_: None)
        kernel = self._launchers[key] = self._modules[program].get_kernel(name)
        if shared_bytes > 48 << 10:
            driver = self._gpu.driver
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(self._gpu.index)))
        return kernel
