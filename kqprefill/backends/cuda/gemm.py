"""Matrix products on the GPU: operands, and the two ways to multiply one by quantised weights.

Each gives linear (out = a · Wᵀ + bias, and + out if `add`; float32) and gated (halves of act(gate) * up); Gemms chooses.
"""

from ctypes import c_int32 as i32
from dataclasses import dataclass, replace

from .kernels import weight_program
from .tiles import SMALL_TILE, choose_gemm_tile, choose_hopper_tile, large_tile, padded, unit_size

_SCRATCH_BYTES = 256 << 20  # of dequantised weights at a time
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2}  # activation.cuh's


@dataclass(frozen=True)
class Operand:
    """A matrix of halves that a GEMM reads: rows padded(columns) apart, holding values times *scale.

    norm: the RMSNorm weight (address) whose output this is, or None. gain: |a row, divided by norm|₂ is at most that, where it is
    known; together they bound what a matrix makes of it.
    """

    address: int
    columns: int
    scale: int
    rows: int
    norm: int | None = None
    gain: float | None = None

    def rows_from(self, first):
        return replace(self, address=self.address + 2 * first * padded(self.columns), rows=self.rows - first)


@dataclass(frozen=True)
class Groups:
    """Experts' rows of an operand: device addresses of experts.cu's groups and their number; of how many experts."""

    address: int
    count: int
    experts: int


_NO_GROUPS = Groups(0, 0, 0)


class Gemms:
    """Chooses how to multiply, by GPU and formats."""

    def __init__(self, gpu, kernels, workspace, maps):
        """maps: the TensorMaps, where Hopper's kernels run, else None."""
        self._portable = PortableGemm(gpu, kernels, workspace)
        self._hopper = HopperGemm(gpu, kernels, maps) if maps else None

    def choose(self, matrices, gated=False):
        """The GEMM for these matrices side by side, or for gate and up. One launch of Hopper's wants units of one length,
        and gate and up of one type."""
        mixed = len({matrix.type if gated else unit_size(matrix.type)[0] for matrix in matrices}) > 1
        return self._portable if self._hopper is None or mixed else self._hopper


class PortableGemm:
    """Slices of W dequantised to halves in a scratch buffer, then gemm_sm80.cu over them: sm_80 and later."""

    def __init__(self, gpu, kernels, workspace):
        self._gpu, self._kernels, self._work = gpu, kernels, workspace

    def programs(self, m, matrices, gated, experts=0):
        """What multiplying m tokens by these matrices may launch (all the classes have this). experts: of stacks of so many."""
        tiles = large_tile(self._gpu.shared_memory), SMALL_TILE
        return [*(tile.program(experts > 0) for tile in tiles), *(weight_program(matrix.type) for matrix in matrices)]

    def group_rows(self, m, matrices, gated, experts):
        """Rows of a tile of an operand that experts share: what `groups` must be made of (all the classes have this)."""
        n = sum(matrix.rows for matrix in matrices)
        return choose_gemm_tile(m, n, self._gpu, experts).block_m

    def linear(self, a, matrices, out, m, w_scale, bias, add, groups=_NO_GROUPS):
        """matrices: one under another; or one, the first of a stack, with groups."""
        if groups.experts:
            return self._stacked_linear(a, matrices[0], out, m, w_scale, bias, groups)
        k, total = padded(a.columns), sum(matrix.rows for matrix in matrices)
        slice_rows = min(total, _SCRATCH_BYTES // (2 * k) // 256 * 256)
        scratch = self._work.get("dequantised", 2 * slice_rows * k)
        for begin in range(0, total, slice_rows):
            end, first = min(begin + slice_rows, total), 0
            for matrix in matrices:  # the part of each that falls into this slice
                low, high = max(begin, first), min(end, first + matrix.rows)
                if low < high:
                    dequantise(self._kernels, matrix, low - first, high - low, scratch, k, w_scale, low - begin)
                first += matrix.rows
            tile = choose_gemm_tile(m, end - begin, self._gpu)
            self._kernels.launch(
                tile.program(),
                "gemm_linear",
                tile.grid(m, end - begin, self._gpu.multiprocessors),
                tile.threads,
                a.address,
                scratch,
                i32(m),
                i32(end - begin),
                i32(k),
                out + 4 * begin,
                i32(total),
                a.scale,
                w_scale,
                bias and bias + 4 * begin,
                out + 4 * begin if add else 0,
                0,
                0,
                i32(0),
                i32(0),
                shared_bytes=tile.shared_bytes,
            )

    def _stacked_linear(self, a, matrix, out, m, w_scale, bias, groups):
        k, rows = padded(a.columns), matrix.rows
        tile = choose_gemm_tile(m, rows, self._gpu, groups.experts)
        for first, last, scratch in self._experts_at_once(2 * rows * k, groups):
            dequantise(self._kernels, matrix, first * rows, (last - first) * rows, scratch, k, w_scale)
            self._kernels.launch(
                tile.program(True),
                "gemm_linear",
                tile.grid(m, rows, self._gpu.multiprocessors, groups.experts),
                tile.threads,
                a.address,
                scratch,
                i32(m),
                i32(rows),
                i32(k),
                out,
                i32(rows),
                a.scale,
                w_scale,
                bias and bias + 4 * first * rows,
                0,
                groups.address,
                groups.count,
                i32(first),
                i32(last),
                shared_bytes=tile.shared_bytes,
            )

    def _experts_at_once(self, nbytes, groups):
        """(first, last + 1, scratch) of as many of a stack's matrices, of nbytes each, as the scratch holds."""
        count = max(1, _SCRATCH_BYTES // nbytes)
        scratch = self._work.get("dequantised", nbytes * min(count, groups.experts))
        for first in range(0, groups.experts, count):
            yield first, min(first + count, groups.experts), scratch

    def _stacked_gated(self, a, gate, up, act, m, w_scale, biases, activation, groups):
        k, rows = padded(a.columns), gate.rows
        tile = choose_gemm_tile(m, 2 * rows, self._gpu, groups.experts)
        for first, last, scratch in self._experts_at_once(4 * rows * k, groups):
            for matrix, place in ((gate, 0), (up, 8)):
                dequantise(
                    self._kernels, matrix, first * rows, (last - first) * rows, scratch, k, w_scale, place, gated=True
                )
            self._kernels.launch(
                tile.program(True),
                "gemm_gated",
                tile.grid(m, 2 * rows, self._gpu.multiprocessors, groups.experts),
                tile.threads,
                a.address,
                scratch,
                i32(m),
                i32(rows),
                i32(rows),
                i32(k),
                act.address,
                i32(rows),
                a.scale,
                w_scale,
                *(bias and bias + 4 * first * rows for bias in biases),
                act.scale,
                i32(activation),
                groups.address,
                groups.count,
                i32(first),
                i32(last),
                shared_bytes=tile.shared_bytes,
            )

    def gated(self, a, gate, up, act, m, w_scale, biases, activation, groups=_NO_GROUPS):
        if groups.experts:
            return self._stacked_gated(a, gate, up, act, m, w_scale, biases, activation, groups)
        k, stride = padded(a.columns), padded(act.columns)
        rows_at_once = min(stride, _SCRATCH_BYTES // (4 * k) // 64 * 64)  # of gate and of up each
        for at in range(0, stride, rows_at_once):
            width = min(rows_at_once, stride - at)
            features = max(0, min(width, gate.rows - at))
            scratch = self._work.get("dequantised", 4 * rows_at_once * k)
            for matrix, first in ((gate, 0), (up, 8)):
                dequantise(self._kernels, matrix, at, features, scratch, k, w_scale, first, gated=True)
            tile = choose_gemm_tile(m, 2 * width, self._gpu)
            self._kernels.launch(
                tile.program(),
                "gemm_gated",
                tile.grid(m, 2 * width, self._gpu.multiprocessors),
                tile.threads,
                a.address,
                scratch,
                i32(m),
                i32(features),
                i32(width),
                i32(k),
                act.address + 2 * at,
                i32(stride),
                a.scale,
                w_scale,
                *(bias and bias + 4 * at for bias in biases),
                act.scale,
                i32(activation),
                0,
                0,
                i32(0),
                i32(0),
                shared_bytes=tile.shared_bytes,
            )


def dequantise(kernels, matrix, first, rows, out, stride, scale, first_out=0, gated=False):
    """Launch weights.cu's dequantize: `rows` rows of a matrix from row `first`, as halves."""
    if rows:
        kernels.launch(
            weight_program(matrix.type),
            "dequantize",
            -(-rows * (stride // 16) // 256),
            256,
            matrix.address,
            i32(matrix.units),
            i32(first),
            i32(rows),
            out,
            i32(stride),
            i32(first_out),
            i32(gated),
            scale,
        )


def _types(matrices):
    """The distinct ggml types of matrices: what gemm_sm90.cu is compiled for, and a type's number in it."""
    return tuple(dict.fromkeys(matrix.type for matrix in matrices))


class HopperGemm:
    """gemm_sm90.cu: W dequantised inside the kernel, for each tile anew; nothing expanded in memory."""

    def __init__(self, gpu, kernels, maps):
        self._gpu, self._kernels, self._maps = gpu, kernels, maps

    def programs(self, m, matrices, gated, experts=0):
        tiles = sum(matrix.row_tiles for matrix in matrices)
        return [self._tile(m, tiles, gated, experts).program(_types(matrices), experts > 0)]

    def group_rows(self, m, matrices, gated, experts):
        return self._tile(m, sum(matrix.row_tiles for matrix in matrices), gated, experts).tokens

    def linear(self, a, matrices, out, m, w_scale, bias, add, groups=_NO_GROUPS):
        types, row_tiles = _types(matrices), sum(matrix.row_tiles for matrix in matrices)
        tile = self._tile(m, row_tiles, False, groups.experts)
        described = [v for w in matrices for v in (w.address, i32(w.rows), i32(types.index(w.type)))]
        described += (0, i32(0), i32(0)) * (3 - len(matrices))
        self._launch(
            "gemm_linear",
            tile,
            types,
            m,
            row_tiles,
            groups,
            *described,
            self._maps.of(a.address, a.columns, a.rows, tile.tokens // tile.cluster),
            i32(m),
            i32(a.columns),
            out,
            i32(sum(w.rows for w in matrices)),
            a.scale,
            w_scale,
            bias,
            i32(add),
            groups.address,
            groups.count,
        )

    def gated(self, a, gate, up, act, m, w_scale, biases, activation, groups=_NO_GROUPS):
        types, row_tiles = (gate.type,), gate.row_tiles + up.row_tiles
        tile = self._tile(m, row_tiles, True, groups.experts)
        self._launch(
            "gemm_gated",
            tile,
            types,
            m,
            row_tiles,
            groups,
            gate.address,
            up.address,
            i32(gate.rows),
            self._maps.of(a.address, a.columns, a.rows, tile.tokens // tile.cluster),
            i32(m),
            i32(a.columns),
            act.address,
            i32(padded(act.columns)),
            a.scale,
            w_scale,
            *biases,
            act.scale,
            i32(activation),
            groups.address,
            groups.count,
        )

    def _tile(self, m, row_tiles, gated, experts):
        return choose_hopper_tile(m, row_tiles, gated, self._gpu.multiprocessors, experts)

    def _launch(self, name, tile, types, m, row_tiles, groups, *arguments):
        grid = tile.grid(m, row_tiles, self._gpu.multiprocessors, groups.experts)
        program, shared = tile.program(types, groups.experts > 0), tile.shared_bytes(types)
        self._kernels.launch(program, name, grid, tile.threads, *arguments, shared_bytes=shared)
