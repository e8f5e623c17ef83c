"""The programs that serve every kernel set: all but the matrix products and attention."""

from __future__ import annotations

from functools import cache

from ...gguf.types import GGML
from .device.compiler import Program
from .units import repack_units

_NAMES = "norm rope scales head experts gates activations per_layer altup latent squares"
NORM, ROPE, SCALES, HEAD, EXPERTS, GATES, ACTIVATIONS, PER_LAYER, ALTUP, LATENT, SQUARES = COMMON = tuple(
    Program(f"{name}.cu") for name in _NAMES.split()
)


@cache
def weight_program(ggml_type: GGML) -> Program:
    """What reads the quantised weights of one ggml type: repack, dequantize, embed, decode_transposed, measure."""
    return Program("weights.cu", (("FORMAT", ggml_type.name), ("REPACK_UNITS", str(repack_units(ggml_type)))))
