"""Which programs a model needs on a GPU, with which constants: the one place where kernels are chosen."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, cached_property
import os

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as GGML

from ...errors import ModelError
from ...gguf.dequantize import SUPPORTED
from .compiler import KernelCache, Program, target_of
from .device import check, cuda_errors

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # what we claim to compile for
LARGEST_HEAD = 256  # rope.cu and attention_sm80.cu


@dataclass(frozen=True)
class GemmTile:
    """The constants of gemm_sm80.cu. All fit in the 99 KB of shared memory that an sm_86 block may have."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int

    @cached_property
    def program(self):
        return Program("gemm_sm80.cu", tuple((f.name.upper(), str(getattr(self, f.name))) for f in fields(self)))

    @property
    def threads(self):
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self):
        return self.stages * (self.block_m + self.block_n) * self.block_k * 2

    def blocks(self, m, n):
        return -(-m // self.block_m) * -(-n // self.block_n)


#                    M    N    K  stages warps
LARGE_TILE = GemmTile(128, 256, 32, 4, 2, 4)
SMALL_TILE = GemmTile(64, 64, 64, 5, 2, 2)
K_MULTIPLE = 64  # operands are zero-padded to this many columns: every tile's K divides it


@dataclass(frozen=True)
class HopperTile:
    """The constants of gemm_sm90.cu: a tile of `tokens` by 64 rows of W for each of its consumer warpgroups."""

    gated: int
    tokens: int
    warpgroups: int
    decoders: int
    substeps: int
    stages: int
    raw_stages: int
    decoder_registers: int
    consumer_registers: int

    @cache
    def program(self, types):
        """The program for launches over matrices of these ggml types (distinct, in the order of their format numbers), or
        over dequantised ones (none)."""
        constants = tuple((f.name.upper(), str(getattr(self, f.name))) for f in fields(self))
        return Program("gemm_sm90.cu", (*constants, ("FORMATS", ",".join(t.name for t in types) or "Halves")))

    @property
    def threads(self):
        return 128 * (self.decoders + self.warpgroups)

    @cache
    def shared_bytes(self, types):
        substeps = min(self.substeps, min((unit_size(t)[0] // 64 for t in types), default=1))
        stage = 2 * 64 * substeps * (self.tokens + 64 * self.warpgroups)
        raw = self.warpgroups * 64 * max((unit_size(t)[1] for t in types), default=0)
        barriers = 16 * (self.stages + self.raw_stages)
        return self.stages * stage + self.raw_stages * raw + barriers

    def blocks(self, m, row_tiles, multiprocessors):
        """The persistent grid: a block a multiprocessor, or fewer where there are fewer tiles."""
        return min(multiprocessors, -(-m // self.tokens) * -(-row_tiles // self.warpgroups))


# least tokens, gated:       tokens, warpgroups, decoders, substeps, stages, raw stages, registers of a decoder and a consumer
HOPPER_TILES = {
    (1, False): HopperTile(0, 16, 1, 2, 2, 5, 4, 128, 200),
    (1, True): HopperTile(1, 16, 2, 2, 4, 2, 2, 104, 144),
    (17, False): HopperTile(0, 64, 1, 2, 4, 2, 4, 128, 200),
    (17, True): HopperTile(1, 64, 2, 2, 2, 3, 2, 104, 144),
    (65, False): HopperTile(0, 128, 1, 2, 2, 3, 3, 128, 200),
    (65, True): HopperTile(1, 128, 2, 1, 1, 4, 2, 128, 184),
    (129, False): HopperTile(0, 256, 2, 1, 1, 3, 2, 128, 184),
    (129, True): HopperTile(1, 256, 2, 1, 1, 3, 2, 128, 184),
}
# Over weights dequantised ahead: 8 ms for the 7 billion weights of an 8B model's layers, whatever the batch's length, for
# multiplying at 664 instead of 570 to 606 TFLOP/s (docs/performance.md): worth it from about 3000 tokens.
HALVES_TILES = {gated: HopperTile(int(gated), 256, 2, 1, 1, 4, 1, 104, 200) for gated in (False, True)}
HALVES_FROM = 3072  # tokens


def choose_hopper_tile(m, gated):
    """The smallest token tile that holds all m tokens; few tokens are bound by decoding, so one consumer to two decoders."""
    return HOPPER_TILES[max(least for least, g in HOPPER_TILES if g == gated and least <= m), gated]


def unit_size(ggml_type):
    """(weights, bytes) of a unit of kernels/quants/: what a row's columns are padded to in device memory."""
    elements, nbytes = GGML_QUANT_SIZES[ggml_type]
    unit = 64 if elements == 1 else 256
    return unit, unit // elements * nbytes


def choose_gemm_tile(m, n, multiprocessors):
    """The large tile does twice the work for each byte it loads; the small one where large ones leave GPU idle."""
    return LARGE_TILE if LARGE_TILE.blocks(m, n) >= multiprocessors * 3 // 4 else SMALL_TILE


@dataclass(frozen=True)
class AttentionTile:
    """The constants of attention_sm80.cu for one head dimension (padded to a multiple of 16)."""

    head_dim: int
    block_kv: int
    warps: int
    q_in_registers: int

    @cached_property
    def program(self):
        return Program("attention_sm80.cu", tuple((f.name.upper(), str(getattr(self, f.name))) for f in fields(self)))

    @property
    def threads(self):
        return 32 * self.warps

    @property
    def block_q(self):
        return 16 * self.warps

    @property
    def shared_bytes(self):
        rows = 4 * self.block_kv + (0 if self.q_in_registers else self.block_q)
        return rows * (2 * self.head_dim + 16)


@cache
def attention_tile(head_dim):
    padded = -(-head_dim // 16) * 16
    if padded > LARGEST_HEAD:
        raise ModelError(f"heads of {head_dim} are not supported on CUDA (at most {LARGEST_HEAD}); use --backend cpu")
    return AttentionTile(padded, 64, 8, 1) if padded <= 128 else AttentionTile(padded, 32, 4, 0)


@cache
def weight_program(ggml_type):
    return Program("weights.cu", (("FORMAT", ggml_type.name),))


COMMON = tuple(Program(f"{name}.cu") for name in ("norm", "rope", "scales", "head"))


def programs_for(head_dim, ggml_types):
    """The programs that any model with these heads and weight types needs, its GEMMs apart."""
    return [attention_tile(head_dim).program, *map(weight_program, sorted(ggml_types)), *COMMON]


def every_program(arch):
    """All programs for an architecture, over the head dimensions in use: what the tests compile."""
    programs = dict.fromkeys(tile.program for tile in (LARGE_TILE, SMALL_TILE))
    for head_dim in (64, 80, 96, 112, 128, 192, 256):
        programs.update(dict.fromkeys(programs_for(head_dim, SUPPORTED)))
    if arch == "sm_90a":
        mixes = [*((t,) for t in sorted(SUPPORTED)), (GGML.Q4_K, GGML.Q6_K)]
        programs.update(dict.fromkeys(tile.program(types) for types in mixes for tile in HOPPER_TILES.values()))
        programs.update(dict.fromkeys(tile.program(()) for tile in HALVES_TILES.values()))
    return list(programs)


class Kernels:
    """Compiled kernels on one GPU; called to launch."""

    def __init__(self, gpu, cache=None):
        self._gpu = gpu
        self._cache = cache or KernelCache()
        self._modules, self._launchers, self._configs = {}, {}, {}

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

    def launch(self, program, name, grid, threads, *args, shared_bytes=0):
        """Launch kernel `name` of a prepared program. Python ints are passed as 64-bit values (addresses), so 32-bit
        arguments must be ctypes' c_int32 and c_float."""
        key = program, name, shared_bytes
        kernel = self._launchers.get(key) or self._get(key)
        config = self._configs.get((grid, threads, shared_bytes))
        if config is None:
            config = self._gpu.core.LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)
            self._configs[grid, threads, shared_bytes] = config
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
