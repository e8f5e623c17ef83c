"""The programs that serve every kernel set: all but the matrix products and attention."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache, cached_property

from ...gguf.types import GGML
from ...models.precision import ROTATED
from .constants import THREADS
from .device.compiler import Program
from .units import repack_units

_BLOCK, _MOST_THREADS = THREADS["round_rows"], 1024  # int8_rows.cu's
_WARP, _PIECE = 32, 8
_MOST_HELD = {_BLOCK: 8, _MOST_THREADS: 4}  # by most threads: those that there are registers for
_FEW_ROWS = 128

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


@dataclass(frozen=True)
class RowsProgram:
    """A program of int8_rows.cu, for rows of as many columns as `threads` threads hold: _PIECE * held each."""

    threads: int
    held: int
    normed: bool

    @property
    def columns(self) -> int:
        """Of the longest rows that threads hold whole."""
        return self.threads * self.held * _PIECE

    @cached_property
    def program(self) -> Program:
        """With round_rows, or, where it is normed, rms_norm_rounded and combine_rms_norm_rounded."""
        constants = {"ROW_THREADS": self.threads, "HELD": self.held, "NORMED": int(self.normed)}
        defines = tuple((name, str(value)) for name, value in constants.items())
        return Program("int8_rows.cu", defines, self.threads if self.threads > _BLOCK else None)

    def blocks(self, rows: int) -> int:
        """For so many rows."""
        return -(-rows * self.threads // max(_BLOCK, self.threads))


@cache
def rounding(columns: int, rows: int) -> RowsProgram:
    """What makes int8 of so many operands' rows. Of many rows a thread holds more: that takes fewer instructions, and
    few rows leave more threads idle than they have work for."""
    held = 1 if rows <= _FEW_ROWS else 4
    return _rows_program(columns, max(4, 16 // held), _MOST_THREADS if rows <= _FEW_ROWS else _BLOCK, held, False)


@cache
def rounded_norm(columns: int) -> RowsProgram:
    """What makes int8 of rows' RMSNorm, with whole warps for a row (normalise_row takes no less)."""
    return _rows_program(columns, _WARP, _BLOCK, 2, True)


def _rows_program(columns: int, fewest: int, most: int, held: int, normed: bool) -> RowsProgram:
    """`fewest` threads, or twice as many until they hold a row; if `most` do not, each holds more, as far as it can."""
    threads = fewest
    while threads < most and columns > threads * held * _PIECE:
        threads *= 2
    while threads == most and held < _MOST_HELD[most] and columns > threads * held * _PIECE:
        held *= 2
    return RowsProgram(threads, held, normed)


def rows_programs() -> list[Program]:
    """All of them."""
    columns = range(ROTATED, 2 * _MOST_THREADS * _MOST_HELD[_MOST_THREADS] * _PIECE + 1, ROTATED)
    all_ = {rounding(n, rows) for n in columns for rows in (_FEW_ROWS, _FEW_ROWS + 1)}
    all_ |= {rounded_norm(n) for n in columns}
    return [own.program for own in sorted(all_, key=astuple)]
