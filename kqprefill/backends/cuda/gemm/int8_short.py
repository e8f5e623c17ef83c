"""kernels/gemm_int8_short_sm90.cu: experts' products in int8 on Hopper, by rows of W that fit registers: down's, or
up's where it has no gate."""

from __future__ import annotations

from functools import cache

from ....models.precision import ROTATED
from ..constants import TILE_ROWS
from ..device.arrays import INT8, DeviceArray
from ..device.compiler import Program
from ..device.gpu import GpuFacts
from ..device.launcher import Launches
from ..weights.matrix import Matrix
from .operand import Groups, Operand, listed
from .tensor_maps import TensorMaps
from .tiles import STAGED_TOKEN_BYTES

_STEPS = 6  # of ROTATED columns in W's rows: 96 registers of a thread. With four the other kernel is faster
_FEW_ROWS = 256  # an expert's, on average: with fewer the other kernel is faster, as blocks here wait for W too often
_TOKENS = 128  # of a set, which a warpgroup multiplies in its turn
_WARPGROUPS, _TILES, _CLUSTER, _STAGES = 2, 2, 2, 12
_STAGED_TOKENS = 64  # of a warpgroup's outputs, at once: two stages of them
_OUTPUT_TILES = 8  # of a cluster, about: with fewer some would have much more to do than others
_MOST_SETS = 8  # of a group
_BARRIERS = 2048  # bytes for the ring's, the turns, W's and the queue of tiles
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40  # of a thread


def fits(m: int, matrix: Matrix, experts: int) -> bool:
    """Whether this kernel is for a stack of so many experts, the first of which is given, and m rows of all."""
    return experts > 0 and -(-matrix.columns // ROTATED) == _STEPS and m >= _FEW_ROWS * experts


def group_rows(m: int, matrix: Matrix, multiprocessors: int) -> int:
    """Rows of a group: many, as W is read for each group, but not so many that there are few output tiles."""
    sets = m * _column_tiles(matrix) / (multiprocessors // _CLUSTER * _OUTPUT_TILES * _TOKENS)
    return _TOKENS * max(1, min(_MOST_SETS, round(sets)))


@cache
def program(in_blocks: bool) -> Program:
    """in_blocks: as of int8.Kind."""
    epilogue = 2 * _WARPGROUPS * _STAGED_TOKENS * STAGED_TOKEN_BYTES
    constants = {
        "GATED": 0,
        "ACTIVATED": 0,
        "HEAD_DIM": 0,
        "GROUPED": 1,
        "TOKENS": _TOKENS,
        "WARPGROUPS": _WARPGROUPS,
        "TILES": _TILES,
        "BLOCKS": 1,
        "CLUSTER": _CLUSTER,
        "SHARERS": _CLUSTER,
        "STAGES": _STAGES,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "EPILOGUE_BYTES": epilogue,
        "K_STEPS": _STEPS,
        "IN_BLOCKS": int(in_blocks),
    }
    return Program(
        "gemm_int8_short_sm90.cu",
        tuple((name, str(value)) for name, value in constants.items()),
        128 * (_WARPGROUPS + 1),
        _STAGES * _TOKENS * ROTATED + _BARRIERS + epilogue,
    )


def multiply(
    launcher: Launches,
    maps: TensorMaps,
    facts: GpuFacts,
    x: Operand,
    matrix: Matrix,
    out: DeviceArray,
    bias: DeviceArray | None,
    groups: Groups,
    out_scale: DeviceArray,
    ldo: int,
) -> None:
    """As Int8Gemm.multiply, by one stack of matrices; x in BYTES."""
    most_groups = groups.groups.shape[0]
    launcher.launch(
        program(out.dtype == INT8),
        "gemm_linear",
        grid=_CLUSTER * min(facts.multiprocessors // _CLUSTER, most_groups * _column_tiles(matrix)),
        w0=matrix.array,
        scales0=matrix.scales,
        rows0=matrix.rows,
        x_map=maps.of(x.values, _TOKENS // _CLUSTER),
        x_scale=x.scale,
        m=x.rows,
        out=out,
        ldo=ldo,
        out_scale=out_scale,
        bias=bias,
        **listed(groups),
    )


def _column_tiles(matrix: Matrix) -> int:
    """How many output tiles a cluster makes of a group's rows, one for some rows of W each."""
    return -(-matrix.rows // (TILE_ROWS * _TILES * _WARPGROUPS * _CLUSTER))
