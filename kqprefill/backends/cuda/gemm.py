"""Matrix products on the GPU: operands, and the three ways to multiply one by quantised weights.

Each gives linear (out = a · Wᵀ + bias + residual, float32) and gated (halves of act(gate) * up); Gemms chooses.
"""

from ctypes import c_int32 as i32
from dataclasses import dataclass, replace

import numpy as np

from .device import check
from .kernels import (
    HALVES_FROM,
    HALVES_TILES,
    K_MULTIPLE,
    LARGE_TILE,
    SMALL_TILE,
    choose_gemm_tile,
    choose_hopper_tile,
    unit_size,
    weight_program,
)
from .weights import TILE_ROWS

_SCRATCH_BYTES = 256 << 20  # of dequantised weights at a time


def padded(columns):
    """Halves from one operand row to the next."""
    return -(-columns // K_MULTIPLE) * K_MULTIPLE


@dataclass(frozen=True)
class Operand:
    """A matrix of halves that a GEMM reads: rows padded(columns) apart, holding values times *scale.

    norm: the RMSNorm weight (address) whose output this is, or None; it bounds what a matrix makes of it.
    """

    address: int
    columns: int
    scale: int
    rows: int
    norm: int | None = None

    def rows_from(self, first):
        return replace(self, address=self.address + 2 * first * padded(self.columns), rows=self.rows - first)


class Gemms:
    """Chooses how to multiply, by GPU, batch length and formats."""

    def __init__(self, gpu, kernels, workspace, weights, portable=False):
        self._portable = PortableGemm(gpu, kernels, workspace)
        self._hopper = None
        if gpu.capability == (9, 0) and not portable:
            self._hopper = HopperGemm(gpu, kernels, weights)
            self._halves = HalvesGemm(gpu, kernels, weights, workspace)

    def choose(self, m, matrices):
        """The GEMM for m tokens and these matrices side by side."""
        if self._hopper is None:
            return self._portable
        # One launch of the fused kernel wants units of one length.
        mixed = len({unit_size(matrix.type)[0] for matrix in matrices}) > 1
        return self._halves if mixed or m >= HALVES_FROM else self._hopper


class PortableGemm:
    """Slices of W dequantised to halves in a scratch buffer, then gemm_sm80.cu over them: sm_80 and later."""

    def __init__(self, gpu, kernels, workspace):
        self._gpu, self._kernels, self._work = gpu, kernels, workspace

    def programs(self, m, matrices, gated):
        """What multiplying m tokens by these matrices may launch (all the classes have this)."""
        return [LARGE_TILE.program, SMALL_TILE.program, *(weight_program(matrix.type) for matrix in matrices)]

    def linear(self, a, matrices, out, m, w_scale, bias, residual):
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
            tile = choose_gemm_tile(m, end - begin, self._gpu.multiprocessors)
            self._kernels.launch(
                tile.program, "gemm_linear", tile.blocks(m, end - begin), tile.threads,
                a.address, scratch, i32(m), i32(end - begin), i32(k), out + 4 * begin, i32(total), a.scale, w_scale,
                bias and bias + 4 * begin, residual and residual + 4 * begin, shared_bytes=tile.shared_bytes,
            )  # fmt: skip

    def gated(self, a, gate, up, act, m, w_scale, biases, activation):
        k, stride = padded(a.columns), padded(act.columns)
        rows_at_once = min(stride, _SCRATCH_BYTES // (4 * k) // 64 * 64)  # of gate and of up each
        for at in range(0, stride, rows_at_once):
            width = min(rows_at_once, stride - at)
            features = max(0, min(width, gate.rows - at))
            scratch = self._work.get("dequantised", 4 * rows_at_once * k)
            for matrix, first in ((gate, 0), (up, 8)):
                dequantise(self._kernels, matrix, at, features, scratch, k, w_scale, first, gated=True)
            tile = choose_gemm_tile(m, 2 * width, self._gpu.multiprocessors)
            self._kernels.launch(
                tile.program, "gemm_gated", tile.blocks(m, 2 * width), tile.threads,
                a.address, scratch, i32(m), i32(features), i32(width), i32(k), act.address + 2 * at, i32(stride),
                a.scale, w_scale, *(bias and bias + 4 * at for bias in biases), act.scale, i32(activation),
                shared_bytes=tile.shared_bytes,
            )  # fmt: skip


def dequantise(kernels, matrix, first, rows, out, stride, scale, first_out=0, gated=False, tiled=False):
    """Launch weights.cu's dequantize: `rows` rows of a matrix from row `first`, as halves."""
    if rows:
        pieces = (-(-rows // TILE_ROWS) * TILE_ROWS if tiled else rows) * (stride // 16)
        kernels.launch(
            weight_program(matrix.type), "dequantize", -(-pieces // 256), 256,
            matrix.address, i32(matrix.units), i32(first), i32(rows), out, i32(stride), i32(first_out), i32(gated),
            i32(tiled), scale,
        )  # fmt: skip


def _types(matrices):
    """The distinct ggml types of matrices: what gemm_sm90.cu is compiled for, and a type's number in it."""
    return tuple(dict.fromkeys(matrix.type for matrix in matrices))


class HopperGemm:
    """gemm_sm90.cu: W dequantised inside the kernel, for each tile anew; nothing expanded in memory."""

    def __init__(self, gpu, kernels, weights):
        self._gpu, self._kernels, self._weights = gpu, kernels, weights

    def programs(self, m, matrices, gated):
        return [choose_hopper_tile(m, gated).program(_types(matrices))]

    def linear(self, a, matrices, out, m, w_scale, bias, residual):
        tile, types = choose_hopper_tile(m, gated=False), _types(matrices)
        pieces = [(matrix.address, matrix.rows, types.index(matrix.type)) for matrix in matrices]
        ldo = sum(matrix.rows for matrix in matrices)
        self._linear(tile, types, pieces, a, m, out, ldo, w_scale, bias, residual)

    def gated(self, a, gate, up, act, m, w_scale, biases, activation):
        tile, types = choose_hopper_tile(m, gated=True), _types((gate, up))
        pieces = [(matrix.address, types.index(matrix.type)) for matrix in (gate, up)]
        self._gated(tile, types, pieces, gate.rows, a, m, act, 0, w_scale, biases, activation)

    def _linear(self, tile, types, pieces, a, m, out, ldo, w_scale, bias, residual):
        """pieces: (address, rows, number of the type) of up to three matrices, side by side in out."""
        row_tiles = sum(-(-rows // TILE_ROWS) for _, rows, _ in pieces)
        pieces = [*pieces, *[(0, 0, 0)] * (3 - len(pieces))]
        described = [value for address, rows, number in pieces for value in (address, i32(rows), i32(number))]
        self._launch(
            "gemm_linear", tile, types, m, row_tiles,
            *described, self._tensor_map(a, tile.tokens), i32(m), i32(a.columns), out, i32(ldo), a.scale, w_scale, bias,
            residual,
        )  # fmt: skip

    def _gated(self, tile, types, pieces, features, a, m, act, at, w_scale, biases, activation):
        """pieces: (address, number of the type) of gate and up; their outputs go to act from column `at`."""
        described = [value for address, number in pieces for value in (address, i32(number))]
        self._launch(
            "gemm_gated", tile, types, m, 2 * -(-features // TILE_ROWS),
            *described, i32(features), self._tensor_map(a, tile.tokens), i32(m), i32(a.columns), act.address + 2 * at,
            i32(padded(act.columns)), a.scale, w_scale, *(bias and bias + 4 * at for bias in biases), act.scale,
            i32(activation),
        )  # fmt: skip

    def _launch(self, name, tile, types, m, row_tiles, *arguments):
        grid = tile.blocks(m, row_tiles, self._gpu.multiprocessors)
        shared = tile.shared_bytes(types)
        self._kernels.launch(tile.program(types), name, grid, tile.threads, *arguments, shared_bytes=shared)

    def _tensor_map(self, a, box_rows):
        """Device address of the TMA descriptor of an operand: boxes of box_rows rows by 64 columns, 128-byte swizzle."""

        def encode(address):
            d = self._gpu.driver
            stride = padded(a.columns)
            descriptor = check(
                d.cuTensorMapEncodeTiled(
                    d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, a.address,
                    [d.cuuint64_t(stride), d.cuuint64_t(a.rows)], [d.cuuint64_t(2 * stride)],
                    [d.cuuint32_t(64), d.cuuint32_t(box_rows)], [d.cuuint32_t(1)] * 2,
                    d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                    d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                    d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            )  # fmt: skip
            self._gpu.upload(address, np.array([int(word) for word in descriptor.opaque], np.uint64))

        return self._weights.descriptor((a.address, a.columns, a.rows, box_rows), encode)


class HalvesGemm(HopperGemm):
    """Slices of W dequantised to wgmma's tiles in a scratch buffer, then gemm_sm90.cu over them: for long batches."""

    def __init__(self, gpu, kernels, weights, workspace):
        super().__init__(gpu, kernels, weights)
        self._work = workspace

    def programs(self, m, matrices, gated):
        return [HALVES_TILES[gated].program(()), *(weight_program(matrix.type) for matrix in matrices)]

    def linear(self, a, matrices, out, m, w_scale, bias, residual):
        k, ldo, column = padded(a.columns), sum(matrix.rows for matrix in matrices), 0
        for parts in self._slices(matrices, k):
            pieces, address = [], self._work.get("dequantised", _SCRATCH_BYTES)
            for matrix, first, rows in parts:
                dequantise(self._kernels, matrix, first, rows, address, k, w_scale, tiled=True)
                pieces.append((address, rows, 0))
                address += -(-rows // TILE_ROWS) * TILE_ROWS * 2 * k
            at = 4 * column
            self._linear(
                HALVES_TILES[False],
                (),
                pieces,
                a,
                m,
                out + at,
                ldo,
                w_scale,
                bias and bias + at,
                residual and residual + at,
            )
            column += sum(rows for _, rows, _ in pieces)

    def _slices(self, matrices, k):
        """Lists of (matrix, first row, rows) whose halves fit the scratch buffer: whole matrices, or a part of one."""
        most = _SCRATCH_BYTES // (2 * k) // TILE_ROWS * TILE_ROWS
        if sum(matrix.row_tiles for matrix in matrices) * TILE_ROWS <= most:
            yield [(matrix, 0, matrix.rows) for matrix in matrices]
            return
        for matrix in matrices:
            for first in range(0, matrix.rows, most):
                yield [(matrix, first, min(most, matrix.rows - first))]

    def gated(self, a, gate, up, act, m, w_scale, biases, activation):
        k = padded(a.columns)
        most = _SCRATCH_BYTES // (4 * k) // TILE_ROWS * TILE_ROWS
        for at in range(0, gate.rows, most):
            features = min(most, gate.rows - at)
            scratch = self._work.get("dequantised", _SCRATCH_BYTES)
            for matrix, first_out in ((gate, 0), (up, 8)):
                dequantise(self._kernels, matrix, at, features, scratch, k, w_scale, first_out, gated=True, tiled=True)
            pieces = [(scratch, 0), (0, 0)]  # both, interleaved
            self._gated(HALVES_TILES[True], (), pieces, features, a, m, act, at, w_scale, biases, activation)
