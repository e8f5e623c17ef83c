"""How a ggml type's blocks are grouped in device memory (kernels/quants/)."""

from __future__ import annotations

from ...gguf.types import GGML, GGML_QUANT_SIZES

_REPACK_ROW_BYTES = 1024  # of each row of a tile that weights.cu's repack holds at a time: 32 of them fit shared memory


def unit_size(ggml_type: GGML) -> tuple[int, int]:
    """(weights, bytes) of a unit: a row's columns are padded to whole units.

    A unit is a 256-weight super-block or eight blocks of 32; of the unquantised types it is 128 weights.
    """
    elements, nbytes = GGML_QUANT_SIZES[ggml_type]
    unit = 128 if elements == 1 else 256
    return unit, unit // elements * nbytes


def repack_units(ggml_type: GGML) -> int:
    """Units of each row that a block of weights.cu's repack takes: 4, 2 or 1."""
    nbytes = unit_size(ggml_type)[1]
    return next(count for count in (4, 2, 1) if count == 1 or count * nbytes <= _REPACK_ROW_BYTES)
