"""The programs that serve every kernel set: all but the matrix products and attention."""

from __future__ import annotations

from functools import cache

from ...gguf.types import GGML
from .constants import THREADS
from .device.compiler import Program
from .units import repack_units

_COLUMNS_KEPT, _MOST_KEPT = 16 * THREADS["round_rows"], 4  # int8_rows.cu's: of a row's columns, so many times

_NAMES = "norm rope scales head experts gates activations per_layer altup latent states squares int8"
NORM, ROPE, SCALES, HEAD, EXPERTS, GATES, ACTIVATIONS, PER_LAYER, ALTUP, LATENT, STATES, SQUARES, INT8 = COMMON = tuple(
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
    return Program("int8_rows.cu", (("KEPT", str(min(_MOST_KEPT, -(-columns // _COLUMNS_KEPT)))),))


def int8_rows_programs() -> list[Program]:
    """All of them."""
    return [int8_rows_program(kept * _COLUMNS_KEPT) for kept in range(1, _MOST_KEPT + 1)]
