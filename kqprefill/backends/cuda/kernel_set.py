"""Which kernels run on a GPU: the one place where its generation decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product

from ...errors import BackendError
from ...gguf.dequantize import SUPPORTED
from ...gguf.types import GGML
from .attention_kernels import AttentionConfig, hopper_attention, portable_attention
from .delta_kernels import delta_programs
from .device.compiler import Program, Target, known_architectures
from .device.gpu import GpuFacts
from .device.launcher import Launches
from .device.workspace import Workspace
from .gemm import hopper, int8, int8_hopper, int8_short, portable
from .gemm.heads import HEADS_KINDS
from .gemm.int8 import Int8Gemm, PortableInt8Gemm, portable_program
from .gemm.mixed import MixedGemm
from .gemm.operand import Gemm
from .gemm.tensor_maps import TensorMaps
from .mamba_kernels import mamba_programs
from .programs import COMMON, int8_program, rows_programs, weight_program
from .weights.halves import KeptHalves
from .weights.matrix import Matrix

_HOPPER = (9, 0)  # its compute capability

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # what we claim to compile for
# Sizes of heads in use: of keys, and of values.
_HEAD_DIMS = *((size, size) for size in (64, 80, 96, 112, 128, 192, 256, 512)), (192, 128)
_MIXED = (GGML.Q4_K, GGML.Q6_K)  # of the matrices of q, k and v in most files, of gate and up in some
_OF_TWO_UNITS = (GGML.F16, GGML.Q4_K)  # where some matrices were left unquantised
_EXPERT_TYPES = (GGML.Q4_K, GGML.Q6_K, GGML.MXFP4)  # of most experts
_UNGATED_TYPES = (GGML.Q4_K, GGML.Q5_K, GGML.Q8_0)  # of most networks without a gate


class Gemms:
    """The ways to multiply that a kernel set has on one GPU: matrices as the file has them, those in int8, and some of
    each."""

    def __init__(self, exact: Gemm, int8: Int8Gemm, launcher: Launches, work: Workspace) -> None:
        self._exact, self._int8, self._mixed = exact, int8, MixedGemm(self.choose, launcher, work)

    def choose(self, matrices: Sequence[Matrix]) -> Gemm:
        """The way for these matrices side by side, or for gate and up."""
        kinds = {matrix.int8 for matrix in matrices}
        if len(kinds) > 1:
            return self._mixed
        return self._int8 if kinds == {True} else self._exact


class KernelSet(ABC):
    """The kernels of one generation of GPUs.

    name: for people. target: what they are compiled to. share_of_peak, int8_share_of_peak: of the matrix units' rates,
    what whole prompts have reached (docs/performance.md). keeps_halves: whether matrices that are multiplied exactly
    are kept as halves where there is room.
    """

    name: str
    share_of_peak: float
    int8_share_of_peak: float
    keeps_halves: bool

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def attention(self, head_dim: int, value_dim: int) -> AttentionConfig:
        """The attention kernel for such heads (Family.head_dims). Raises ModelError where they are too wide."""

    @abstractmethod
    def gemms(
        self,
        facts: GpuFacts,
        launcher: Launches,
        work: Workspace,
        maps: TensorMaps,
        halves: KeptHalves | None = None,
    ) -> Gemms:
        """The set's ways to multiply, on a GPU; halves: where matrices may be kept as such, if at all."""

    @abstractmethod
    def _own_programs(self) -> Iterator[Program]:
        """Those of matrix products and attention, over the formats, heads and mixtures in use."""

    def every_program(self) -> list[Program]:
        """All programs that files in use may need: what the tests compile."""
        of_formats = (program(kind) for program in (weight_program, int8_program) for kind in sorted(SUPPORTED))
        of_every_set = (*COMMON, *of_formats, *rows_programs(), *delta_programs(), *mamba_programs())
        return list(dict.fromkeys((*of_every_set, *self._own_programs())))


class Portable(KernelSet):
    """Kernels for every GPU from compute capability 8.0 on: mma.sync and cp.async."""

    name = "portable"
    share_of_peak = 0.35
    int8_share_of_peak = 0.28
    keeps_halves = True

    def attention(self, head_dim: int, value_dim: int) -> AttentionConfig:
        return portable_attention(head_dim, value_dim)

    def gemms(
        self,
        facts: GpuFacts,
        launcher: Launches,
        work: Workspace,
        maps: TensorMaps,
        halves: KeptHalves | None = None,
    ) -> Gemms:
        exact = portable.PortableGemm(facts, launcher, work, halves)
        return Gemms(exact, PortableInt8Gemm(facts, launcher, work), launcher, work)

    def _own_programs(self) -> Iterator[Program]:
        for config in (*portable.LARGE, *portable.MEDIUM, *portable.SMALL):
            yield config.program()
            yield config.program(grouped=True)
            yield config.program(activated=True)
            yield from (portable_program(config, kind) for kind in int8.KINDS)
        for sizes in _HEAD_DIMS:
            yield self.attention(*sizes).program()
        yield self.attention(256, 256).program(both_ways=True)  # EmbeddingGemma's


class Hopper(Portable):
    """Kernels for compute capability 9.0: wgmma and the copy engine."""

    name = "Hopper"
    share_of_peak = 0.6
    int8_share_of_peak = 0.5
    keeps_halves = False  # its kernels decode W as they multiply

    def attention(self, head_dim: int, value_dim: int) -> AttentionConfig:
        return hopper_attention(head_dim, value_dim)

    def gemms(
        self,
        facts: GpuFacts,
        launcher: Launches,
        work: Workspace,
        maps: TensorMaps,
        halves: KeptHalves | None = None,
    ) -> Gemms:
        exact = hopper.HopperGemm(facts, launcher, maps)
        return Gemms(exact, int8_hopper.HopperInt8Gemm(facts, launcher, work, maps), launcher, work)

    def _own_programs(self) -> Iterator[Program]:
        yield from super()._own_programs()
        for config in hopper.CONFIGS:
            for kind in sorted(SUPPORTED):
                yield config.program((kind,))
            yield config.program(_MIXED)
            yield config.program(_OF_TWO_UNITS)
            if not config.gated:
                for kind in _UNGATED_TYPES:
                    yield config.program((kind,), activated=True)
            for kind in _EXPERT_TYPES:
                yield config.program((kind,), grouped=True)
        for heads, config in product(HEADS_KINDS, hopper.HEADS_CONFIGS):
            if clustered := heads.clustered(config):
                yield clustered.program(_MIXED[:1], heads=heads)
                yield clustered.program(_MIXED, heads=heads)
        for of_int8 in int8_hopper.CONFIGS:
            yield of_int8.program(int8.Kind(), whole=False)
            yield from (of_int8.program(own) for own in int8.KINDS if of_int8.tiles == 2 or not own.gated)
            for heads in HEADS_KINDS:
                if heads.clustered(of_int8) == of_int8:
                    yield of_int8.program(int8.Kind(), heads=heads)
        yield from (int8_short.program(in_blocks) for in_blocks in (False, True))
        yield from (self.attention(*sizes).program(sharers=2) for sizes in _HEAD_DIMS)
        yield self.attention(256, 256).program(both_ways=True, sharers=2)


def kernel_set_of(capability: tuple[int, int], kernels: str = "auto") -> KernelSet:
    """The kernel set for a GPU of that compute capability; kernels "portable": that of every GPU, whatever this one
    has.

    Raises BackendError where NVRTC does not compile for it.
    """
    kind = Hopper if capability == _HOPPER and kernels == "auto" else Portable
    return kind(target_of(capability))


def target_of(capability: tuple[int, int]) -> Target:
    """A CUBIN for exactly this GPU, or PTX where NVRTC does not know it.

    A CUBIN loads on any driver of its major version; PTX only on one as new as NVRTC
    (CUDA_ERROR_UNSUPPORTED_PTX_VERSION).
    """
    known = known_architectures()
    arch = capability[0] * 10 + capability[1]
    if arch in known:
        return Target("cubin", f"sm_{arch}" + ("a" if capability == _HOPPER else ""))
    older = [a for a in known if a <= arch]
    if not older:
        raise BackendError(f"NVRTC cannot compile for compute capability {capability[0]}.{capability[1]}")
    return Target("ptx", f"compute_{max(older)}")


def every_program(arch: str) -> list[Program]:
    """All programs that may run on an architecture ("sm_90a"), over the head dimensions and formats in use."""
    capability = {a: (int(a.rstrip("a")[3:]) // 10, int(a.rstrip("a")[3:]) % 10) for a in ARCHITECTURES}[arch]
    return kernel_set_of(capability).every_program()
