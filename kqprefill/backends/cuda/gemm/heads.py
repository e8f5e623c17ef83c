"""What the products of q, k and v are made into, where a GEMM does that itself (kernels/include/epilogue_heads.cuh)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from ..device.arrays import DeviceArray
from ..device.signatures import Argument
from .tensor_maps import TensorMaps
from .tiles import TOKEN_ROWS_BYTES, TileConfig

_ANGLE_STAGE = 32  # a stage of the ring has the angles of so many in head_dim of a token tile's tokens
_Config = TypeVar("_Config", bound=TileConfig)


@dataclass(frozen=True)
class HeadsKind:
    """What a program for heads is compiled for. normed: whether q and k are normalised by head; interleaved: whether
    the columns that are rotated together are neighbours, not half a head apart."""

    head_dim: int
    normed: bool
    interleaved: bool

    @property
    def is_known(self) -> bool:
        """Whether there is such an epilogue: its threads add up squares of columns half a head apart."""
        return self.head_dim in (64, 128) and not (self.normed and self.interleaved)

    def clustered(self, config: _Config) -> _Config | None:
        """The configuration with as many blocks in a cluster as have whole heads; None where a warpgroup has no columns
        that are half a head apart."""
        if config.tiles < 2 or config.warpgroups < 2:
            return None
        return replace(config, cluster=2) if self.head_dim == 128 and config.warpgroups % 2 else config

    def shared_bytes(self, config: TileConfig) -> int:
        """Of a block, for each warpgroup: of each token its warps' sums of squares, and in their place what it writes;
        of each an inverse root mean square; where blocks have halves of heads, sums that they give each other, twice,
        and a barrier."""
        of_warpgroup = TOKEN_ROWS_BYTES
        if self.normed:
            of_warpgroup = max(TOKEN_ROWS_BYTES, 4 * 4 * config.tokens) + 4 * config.tokens
            if self.head_dim == 128 and config.warpgroups == 3:
                of_warpgroup += 4 * 2 * config.tokens + 8
        return config.warpgroups * of_warpgroup

    def constants(self, config: TileConfig) -> dict[str, int]:
        """The defines that say so."""
        return {
            "HEAD_DIM": self.head_dim,
            "NORMED": int(self.normed),
            "INTERLEAVED": int(self.interleaved),
            "EPILOGUE_BYTES": self.shared_bytes(config),
        }


HEADS_KINDS = tuple(
    HeadsKind(head_dim, normed, interleaved)
    for head_dim in (64, 128)
    for normed, interleaved in ((False, False), (False, True), (True, False))
)  # all that there are


def no_heads(epilogue_bytes: int) -> dict[str, int]:
    """The same of other products, whose epilogue takes so many bytes of shared memory."""
    return {"HEAD_DIM": 0, "EPILOGUE_BYTES": epilogue_bytes}


@dataclass(frozen=True)
class HeadsOutput:
    """Where heads go, and how they are made; in the words of kernels/rope.cu's rotate_qkv. They are those of q, of k
    and of v, in this order; nkv is 0, and k and v are None, where there are queries only."""

    kind: HeadsKind
    q: DeviceArray
    k: DeviceArray | None
    v: DeviceArray | None
    nq: int
    nkv: int
    q_norm: DeviceArray | None
    k_norm: DeviceArray | None
    epsilon: float
    table: DeviceArray | None
    q_scale: DeviceArray
    k_scale: DeviceArray
    v_scale: DeviceArray
    kv_rows: DeviceArray | None

    def angle_map(self, maps: TensorMaps, config: TileConfig) -> DeviceArray | None:
        """The tensor map of the table of angles: boxes of as many tokens as a block brings for a stage
        (kernels/include/angles_sm90.cuh). None where nothing is rotated."""
        if self.table is None:
            return None
        return maps.of(self.table, config.box_rows * _ANGLE_STAGE // self.kind.head_dim)

    @property
    def arguments(self) -> dict[str, Argument]:
        """What else gemm_heads is told of them, by its parameters' names."""
        return {
            "q_out": self.q,
            "k_out": self.k,
            "v_out": self.v,
            "nq": self.nq,
            "nkv": self.nkv,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
            "epsilon": self.epsilon,
            "q_scale": self.q_scale,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "kv_rows": self.kv_rows,
        }
