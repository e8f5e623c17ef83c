"""The programs that serve every kernel set: all but the matrix products and attention."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache, cached_property

from ...gguf.types import GGML
from .constants import THREADS
from .device.compiler import Program
from .units import repack_units

_BLOCK, _SIXTEEN, _MOST_KEPT = THREADS["round_rows"], 16, 4  # int8_rows.cu's
_PARTS = 8, 16, 32, 64, 128  # of a block, that may share a row
_FEW_ROWS, _MANY_ROWS = 128, 1024

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
    """A program of int8_rows.cu, for rows of as many columns as `threads` threads keep: _SIXTEEN * kept each."""

    threads: int
    kept: int
    normed: bool

    @property
    def columns(self) -> int:
        """Of the longest rows that threads keep whole."""
        return self.threads * self.kept * _SIXTEEN

    @cached_property
    def program(self) -> Program:
        """With round_rows, or, where it is normed, rms_norm_rounded."""
        constants = {"ROW_THREADS": self.threads, "KEPT": self.kept, "NORMED": int(self.normed)}
        defines = tuple((name, str(value)) for name, value in constants.items())
        return Program("int8_rows.cu", defines, self.threads if self.threads > _BLOCK else None)

    def blocks(self, rows: int) -> int:
        """For so many rows."""
        return -(-rows * self.threads // max(_BLOCK, self.threads))


def rounding(columns: int, rows: int) -> RowsProgram:
    """What makes int8 of so many operands' rows: few rows have as many threads as there may be; of many a thread keeps
    more, so that more of its loads are on their way."""
    if rows <= _FEW_ROWS:
        return _rows_program(columns, (*_PARTS, _BLOCK, 512, 1024), 1, False)
    return _rows_program(columns, (*_PARTS, _BLOCK), _MOST_KEPT - 1 if rows >= _MANY_ROWS else 1, False)


def rounded_norm(columns: int) -> RowsProgram:
    """What makes int8 of rows' RMSNorm, with as few whole warps as keep a row (normalise_row takes no less)."""
    return _rows_program(columns, (*_PARTS[2:], _BLOCK), 1, True)


@cache
def _rows_program(columns: int, threads: tuple[int, ...], kept: int, normed: bool) -> RowsProgram:
    """The fewest of these threads who keep so many sixteens each at most; else all of them, or, for rows so long that
    they would have to keep _MOST_KEPT, for which 1024 have no registers, a block of the usual size."""
    most = threads[-1] if columns <= threads[-1] * _SIXTEEN * (_MOST_KEPT - 1) else _BLOCK
    fewest = next((n for n in threads if columns <= n * _SIXTEEN * kept), most)
    return RowsProgram(fewest, min(_MOST_KEPT, -(-columns // (fewest * _SIXTEEN))), normed)


def rows_programs() -> list[Program]:
    """All of them."""
    columns = [_SIXTEEN * 8 * n for n in range(1, 4 * _MOST_KEPT * _BLOCK // 8 + 1)]
    rows = _FEW_ROWS, _FEW_ROWS + 1, _MANY_ROWS
    all_ = {rounding(n, r) for n in columns for r in rows} | {rounded_norm(n) for n in columns}
    return [own.program for own in sorted(all_, key=astuple)]
