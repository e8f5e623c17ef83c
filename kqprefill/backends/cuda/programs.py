"""The programs that serve every kernel set: all but the matrix products and attention."""

from __future__ import annotations

from functools import cache

from ...gguf.types import GGML
from .constants import THREADS
from .device.compiler import Program
from .units import repack_units

_MOST_WARPS, _WARP_COLUMNS, _MOST_KEPT = THREADS["round_rows"] // 32, 512, 4  # int8_rows.cu's

_NAMES = "norm rope scales head experts gates activations per_layer altup latent squares int8"
NORM, ROPE, SCALES, HEAD, EXPERTS, GATES, ACTIVATIONS, PER_LAYER, ALTUP, LATENT, SQUARES, INT8 = COMMON = tuple(
    Program(f"{name}.cu") for name in _NAMES.split()
)


@cache
def weight_program(ggml_type: GGML) -> Program:
    """What reads the quantised weights of one ggml type: repack, dequantize, embed, decode_transposed, measure."""
    return Program("weights.cu", (("FORMAT", ggml_type.name), ("REPACK_UNITS", str(repack_units(ggml_type)))))


@cache
def int8_program(ggml_type: GGML) -> Program:
    """What makes matrices that are multiplied in int8 of weight tiles of one ggml type: make_int8."""
    return Program("int8_weights.cu", (("FORMAT", ggml_type.name),))


@cache
def int8_rows_program(columns: int) -> Program:
    """What makes int8 of operands' rows of so many columns: round_rows, rms_norm_rounded."""
    warps = _row_warps(columns)
    kept = min(_MOST_KEPT, -(-columns // (_WARP_COLUMNS * warps)))
    return Program("int8_rows.cu", (("WARPS", str(warps)), ("KEPT", str(kept))))


def int8_rows_blocks(rows: int, columns: int) -> int:
    """Blocks of that program's kernels for so many rows."""
    return -(-rows * _row_warps(columns) // _MOST_WARPS)


def _row_warps(columns: int) -> int:
    """Warps that a row has: as few as keep it at once, at most all of a block."""
    return next(warps for warps in (1, 2, 4, _MOST_WARPS) if warps == _MOST_WARPS or columns <= _WARP_COLUMNS * warps)


def int8_rows_programs() -> list[Program]:
    """All of them."""
    kept = [_MOST_WARPS * times for times in range(2, _MOST_KEPT + 1)]
    return [int8_rows_program(_WARP_COLUMNS * warps) for warps in (1, 2, 4, _MOST_WARPS, *kept)]
