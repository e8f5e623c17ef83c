"""kernels/gemm_sm80.cu: W dequantised to halves, slices of it in a scratch buffer unless they are kept
(weights/halves.py), then multiplied. For sm_80 and later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache

from ..constants import ACTIVATIONS, THREADS
from ..device.arrays import FLOAT16, DeviceArray
from ..device.compiler import Program
from ..device.gpu import GpuFacts
from ..device.launcher import Launches
from ..device.workspace import Workspace
from ..programs import weight_program
from ..weights.halves import KeptHalves
from ..weights.matrix import Matrix
from .operand import Gemm, Groups, Operand, listed

_SCRATCH_BYTES = 256 << 20  # of dequantised weights at a time
_GATED_ROWS = 8  # gate's and up's rows follow one another so many at a time (weights.cu: dequantize's `gated`)
_WEIGHTS_A_THREAD = 16  # that dequantize decodes


@dataclass(frozen=True)
class PortableConfig:
    """The constants of gemm_sm80.cu: a block's output tile, its steps, and how its warps share them."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int

    @cache
    def program(self, grouped: bool = False, activated: bool = False) -> Program:
        """grouped: over a stack of experts. activated: of a matrix without a gate, whose outputs go through an
        activation."""
        kind = ("GROUPED", str(int(grouped))), ("ACTIVATED", str(int(activated)))
        threads = 32 * self.warps_m * self.warps_n
        return Program("gemm_sm80.cu", (*self.tiles, *kind), threads, self.shared_bytes)

    @property
    def tiles(self) -> tuple[tuple[str, str], ...]:
        """The constants that say how a block goes about it."""
        return tuple((field.name.upper(), str(getattr(self, field.name))) for field in fields(self))

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * 2

    def output_tiles(self, m: int, n: int, experts: int = 0) -> int:
        """Of m by n outputs; experts: of which each has some of the m rows (an estimate)."""
        return (-(-m // self.block_m) + experts // 2) * -(-n // self.block_n)

    def grid(self, m: int, n: int, multiprocessors: int, experts: int = 0) -> int:
        """Blocks to launch: of large tiles as many as run at once, each of which makes several."""
        tiles = self.output_tiles(m, n, 2 * experts)
        if self in SMALL:
            return min(tiles, 4 * multiprocessors) if experts else tiles
        return min(tiles, multiprocessors)


#                   M    N    K  stages warps
LARGE = (
    PortableConfig(128, 256, 64, 3, 2, 4),  # 144 KB: an H100's, 3% faster than the next
    PortableConfig(128, 256, 32, 4, 2, 4),  # the 99 KB that a block of sm_86, sm_89 or sm_120 may have
)
MEDIUM = (
    PortableConfig(128, 128, 64, 4, 2, 4),  # 128 KB, 7% faster than the next
    PortableConfig(128, 128, 64, 3, 2, 4),
)
SMALL = (PortableConfig(64, 64, 64, 5, 2, 2),)
# With what a round takes, of an output tile for each multiprocessor: microseconds of 4096 columns on an H100
# (docs/performance-int8.md: portable kernels).
_SIZES = (LARGE, 75), (MEDIUM, 44), (SMALL, 16)


def fitting(configs: Sequence[PortableConfig], shared_memory: int) -> PortableConfig:
    """The first of these that a block which may have this much shared memory (bytes) can run."""
    return next(config for config in configs if config.shared_bytes <= shared_memory)


def best_config(m: int, n: int, facts: GpuFacts, experts: int = 0) -> PortableConfig:
    """For m by n outputs. The larger a tile, the more work it does for each byte that it loads; smaller ones serve
    where larger ones would leave multiprocessors idle."""

    def cost(size: tuple[Sequence[PortableConfig], int]) -> int:
        tiles = fitting(size[0], facts.shared_memory).output_tiles(m, n, experts)
        return -(-tiles // facts.multiprocessors) * size[1]

    return fitting(min(_SIZES, key=cost)[0], facts.shared_memory)


class PortableGemm(Gemm):
    """W dequantised, by slices, or whole where its halves are kept, then multiplied."""

    def __init__(self, facts: GpuFacts, launcher: Launches, work: Workspace, halves: KeptHalves | None = None) -> None:
        self._facts, self._launcher, self._work, self._halves = facts, launcher, work, halves

    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        return best_config(m, sum(matrix.rows for matrix in matrices), self._facts, experts).block_m

    def linear(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None = None,
        out_scale: DeviceArray | None = None,
        ldo: int | None = None,
    ) -> None:
        k = a.format.padded(a.columns)
        if groups is not None:
            (matrix,) = matrices

            def of_experts(first: int, last: int, to: DeviceArray) -> None:
                self._dequantise(matrix, first * matrix.rows, (last - first) * matrix.rows, to, weight_scale)

            stack = _Product(matrices, weight_scale, groups.experts, matrix.rows, k)
            for first, last, halves in self._slices(stack, of_experts):
                its_bias = None if bias is None else bias.rows(first)
                experts = _Experts(groups, first, last)
                self._linear(
                    a, halves, matrix.rows, out, matrix.rows, weight_scale, its_bias, False, experts, out_scale
                )
            return

        def dequantise(begin: int, end: int, to: DeviceArray) -> None:
            first = 0
            for matrix in matrices:  # the part of each that falls into this slice
                low, high = max(begin, first), min(end, first + matrix.rows)
                self._dequantise(matrix, low - first, high - low, to, weight_scale, first_out=low - begin)
                first += matrix.rows

        total = sum(matrix.rows for matrix in matrices)
        for begin, end, halves in self._slices(_Product(matrices, weight_scale, total, 1, k, 256), dequantise):
            its_bias = None if bias is None else bias.rows(begin)
            self._linear(a, halves, end - begin, out.columns(begin), ldo or total, weight_scale, its_bias, add, None)

    def _linear(
        self,
        a: Operand,
        weights: DeviceArray,
        n: int,
        out: DeviceArray,
        ldo: int,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        experts: _Experts | None,
        out_scale: DeviceArray | None = None,
    ) -> None:
        m, count = a.rows, experts.count if experts else 0
        config = best_config(m, n, self._facts, count)
        self._launcher.launch(
            config.program(experts is not None),
            "gemm_linear",
            grid=config.grid(m, n, self._facts.multiprocessors, count),
            x=a.values,
            w=weights,
            m=m,
            n=n,
            k=a.values.shape[1],
            out=out,
            ldo=ldo,
            x_scale=a.scale,
            w_scale=weight_scale,
            out_scale=out_scale,
            bias=bias,
            residual=out if add else None,
            **_grouping(experts),
        )

    def activated(
        self,
        a: Operand,
        matrix: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        activation: str,
    ) -> None:
        k, stride = a.format.padded(a.columns), act.values.shape[1]

        def dequantise(begin: int, end: int, to: DeviceArray) -> None:
            self._dequantise(matrix, begin, min(end, matrix.rows) - begin, to, weight_scale)

        for at, end, halves in self._slices(_Product([matrix], weight_scale, stride, 1, k, 256), dequantise):
            width = end - at
            features = max(0, min(width, matrix.rows - at))
            config = best_config(a.rows, width, self._facts)
            self._launcher.launch(
                config.program(activated=True),
                "gemm_activated",
                grid=config.grid(a.rows, width, self._facts.multiprocessors),
                x=a.values,
                w=halves,
                m=a.rows,
                features=features,
                width=width,
                k=k,
                out=act.values.columns(at),
                ldo=stride,
                x_scale=a.scale,
                w_scale=weight_scale,
                bias=None if bias is None else bias.rows(at),
                out_scale=act.scale,
                activation=ACTIVATIONS[activation],
            )

    def gated(
        self,
        a: Operand,
        gate: Matrix,
        up: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        biases: tuple[DeviceArray | None, DeviceArray | None],
        activation: str,
        groups: Groups | None = None,
    ) -> None:
        k, rows, stride = a.format.padded(a.columns), gate.rows, act.values.shape[1]

        def by_turns(first: int, count: int, to: DeviceArray) -> None:
            for matrix, place in ((gate, 0), (up, _GATED_ROWS)):
                self._dequantise(matrix, first, count, to, weight_scale, first_out=place, gated=True)

        if groups is not None:

            def of_experts(first: int, last: int, to: DeviceArray) -> None:
                by_turns(first * rows, (last - first) * rows, to)

            stacks = _Product([gate, up], weight_scale, groups.experts, 2 * rows, k, gated=True)
            for first, last, halves in self._slices(stacks, of_experts):
                theirs = tuple(None if bias is None else bias.rows(first) for bias in biases)
                experts = _Experts(groups, first, last)
                self._gated(a, halves, rows, rows, act, act.values, weight_scale, theirs, activation, experts)
            return

        def dequantise(begin: int, end: int, to: DeviceArray) -> None:
            by_turns(begin, min(end, rows) - begin, to)

        product = _Product([gate, up], weight_scale, stride, 2, k, 64, gated=True)
        for at, end, halves in self._slices(product, dequantise):
            features = max(0, min(end, rows) - at)
            theirs = tuple(None if bias is None else bias.rows(at) for bias in biases)
            out = act.values.columns(at)
            self._gated(a, halves, features, end - at, act, out, weight_scale, theirs, activation, None)

    def _gated(
        self,
        a: Operand,
        weights: DeviceArray,
        features: int,
        width: int,
        act: Operand,
        out: DeviceArray,
        weight_scale: DeviceArray,
        biases: tuple[DeviceArray | None, ...],
        activation: str,
        experts: _Experts | None,
    ) -> None:
        m, count = a.rows, experts.count if experts else 0
        config = best_config(m, 2 * width, self._facts, count)
        gate_bias, up_bias = biases
        self._launcher.launch(
            config.program(experts is not None),
            "gemm_gated",
            grid=config.grid(m, 2 * width, self._facts.multiprocessors, count),
            x=a.values,
            w=weights,
            m=m,
            features=features,
            width=width,
            k=a.values.shape[1],
            out=out,
            ldo=act.values.shape[1],
            x_scale=a.scale,
            w_scale=weight_scale,
            gate_bias=gate_bias,
            up_bias=up_bias,
            out_scale=act.scale,
            activation=ACTIVATIONS[activation],
            **_grouping(experts),
        )

    def _slices(
        self, product: _Product, dequantise: Callable[[int, int, DeviceArray], None]
    ) -> Iterator[tuple[int, int, DeviceArray]]:
        """(first, last + 1, their halves): all parts of a product, where they are kept; else as many at a time as the
        scratch holds. dequantise(first, last + 1, to) launches what makes parts' halves."""
        count, rows, k = product.parts, product.rows, product.k
        if self._halves is not None:
            kept = self._halves.of(
                product.matrices,
                product.gated,
                product.scale,
                (count * rows, k),
                lambda to: dequantise(0, count, to),
            )
            if kept is not None:
                yield 0, count, kept
                return
        at_once = max(1, min(count, _SCRATCH_BYTES // (2 * rows * k) // product.multiple * product.multiple))
        scratch = self._work.array("dequantised", FLOAT16, at_once * rows, k)
        for first in range(0, count, at_once):
            last = min(first + at_once, count)
            dequantise(first, last, scratch)
            yield first, last, scratch

    def _dequantise(
        self,
        matrix: Matrix,
        first: int,
        rows: int,
        out: DeviceArray,
        scale: DeviceArray,
        first_out: int = 0,
        gated: bool = False,
    ) -> None:
        """Launch weights.cu's dequantize: `rows` rows of a matrix from row `first`, as halves from row `first_out`."""
        if rows <= 0:
            return
        stride = out.shape[1]
        threads = rows * (stride // _WEIGHTS_A_THREAD)
        self._launcher.launch(
            weight_program(matrix.type),
            "dequantize",
            grid=-(-threads // THREADS["dequantize"]),
            weights=matrix.array,
            units=matrix.units,
            first=first,
            rows=rows,
            out=out,
            stride=stride,
            first_out=first_out,
            gated=int(gated),
            scale=scale,
        )


@dataclass(frozen=True)
class _Product:
    """What is multiplied as halves times *scale: matrices that are one under another, or (gated) by turns.

    parts: its rows, or experts; rows: of halves, of a part; k: halves of each. multiple: as many parts at a time, or
    some times as many, unless all fit the scratch.
    """

    matrices: Sequence[Matrix]
    scale: DeviceArray
    parts: int
    rows: int
    k: int
    multiple: int = 1
    gated: bool = False


@dataclass(frozen=True)
class _Experts:
    """Which experts' matrices the halves are of: first to last - 1."""

    groups: Groups
    first: int
    last: int

    @property
    def count(self) -> int:
        """Of the whole stack."""
        return self.groups.experts


def _grouping(experts: _Experts | None) -> dict[str, DeviceArray | int | None]:
    """The last parameters of both kernels."""
    if experts is None:
        return {**listed(None), "first_expert": 0, "last_expert": 0}
    return {**listed(experts.groups), "first_expert": experts.first, "last_expert": experts.last}
