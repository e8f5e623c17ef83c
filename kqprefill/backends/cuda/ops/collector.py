"""The squares of products' inputs, summed on the device beside the products (kernels/squares.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....collector import Collector, Float64Array, Squares
from ..constants import THREADS
from ..device.arrays import FLOAT64, DeviceArray
from ..device.gpu import Gpu, cuda_errors
from ..device.launcher import Launches
from ..device.workspace import aligned
from ..gemm.operand import Operand, operand_positions
from ..programs import SQUARES

_COLUMNS = 64  # of a block (squares.cu: kColumns)
_WARPS = THREADS["add_expert_squares"] // 32


@dataclass(frozen=True)
class _Sums:
    """Where the sums of an input are, float64 [experts, stride].

    picks: where in a row of them the columns are, in the file's order. scale: of the inputs that were squared, None for
    1. rows: of each expert's counts, float64 [experts]; None where all rows are one matrix's.
    """

    array: DeviceArray
    picks: NDArray[np.intp]
    scale: DeviceArray | None
    rows: DeviceArray | None


class DeviceCollector(Collector):
    """A Collector whose sums are in one allocation on the device.

    room: bytes of it; None for a rehearsal's, of which `taken` then says how many there must be.
    """

    def __init__(self, output: bool, gpu: Gpu, launcher: Launches, room: int | None = None) -> None:
        super().__init__(output)
        self._gpu, self._launcher = gpu, launcher
        self._sums: dict[str, _Sums] = {}
        self._counts: dict[str, int] = {}
        self.taken, self.room = 0, room or 0
        self._buffer: Any = gpu.allocate(room or 0, "sums of squares")
        if room:
            gpu.zero(int(self._buffer.handle), room)

    def add(
        self,
        tensors: Sequence[str],
        a: Operand,
        length: int,
        offset: int = 0,
        firsts: DeviceArray | None = None,
        row_scale: DeviceArray | None = None,
    ) -> None:
        """An operand is about to be multiplied by these tensors.

        length: rows of each of the batch's sequences; offset: which of the batch's rows the operand begins with.
        firsts: int32 [experts], each expert's first row, of an operand whose rows are sorted by expert. row_scale: what
        its rows are to be multiplied by, float32 [rows].
        """
        name = self.sharing(tensors, a)
        if name is None:
            return
        stride, experts = a.values.shape[1], 1 if firsts is None else firsts.shape[0]
        sums = self._sums.get(name)
        if sums is None:
            rows = None if firsts is None else self._array(experts)
            sums = _Sums(self._array(experts, stride), operand_positions(a.columns), a.scale, rows)
            self._sums[name] = sums
        if firsts is None:
            self._counts[name] = self._counts.get(name, 0) + a.rows
            self._add_rows(a, sums.array, length, offset, row_scale)
        else:
            self._launcher.launch(
                SQUARES,
                "add_expert_squares",
                grid=(-(-stride // _COLUMNS), -(-experts // _WARPS)),
                x=a.values,
                stride=stride,
                rows=a.rows,
                firsts=firsts,
                experts=experts,
                sums=sums.array,
                rows_of=sums.rows,
            )

    def add_part(self, tensor: str, a: Operand, length: int, part: int, parts: int, width: int, heads: int) -> None:
        """An operand that is one of so many parts of what is about to be multiplied by a tensor's matrices, one a head:
        of each head as many columns of `width` as a part has. It is the batch's rows; the part with number 0 comes
        first. length: as for `add`."""
        stride, own = a.values.shape[1], a.columns // heads
        if part == 0:
            self.sharing([tensor], a)
            self._counts[tensor] = self._counts.get(tensor, 0) + a.rows
        if tensor not in self._sums:
            column = np.arange(width)
            within = np.arange(heads)[:, None] * own + column % own
            picks = column // own * stride + operand_positions(a.columns)[within]
            self._sums[tensor] = _Sums(self._array(1, parts * stride), picks.ravel(), a.scale, None)
        self._add_rows(a, self._sums[tensor].array.columns(part * stride), length, 0, None)

    def _add_rows(self, a: Operand, sums: DeviceArray, length: int, offset: int, row_scale: DeviceArray | None) -> None:
        stride = a.values.shape[1]
        self._launcher.launch(
            SQUARES,
            "add_squares",
            grid=-(-stride // _COLUMNS),
            x=a.values,
            stride=stride,
            columns=stride,
            rows=a.rows,
            length=length,
            offset=offset % length,
            row_scale=row_scale,
            sums=sums,
        )

    def add_heads(self, tensor: str, values: DeviceArray, heads: int, width: int, length: int, offset: int) -> None:
        """Float32 values [rows, heads * values of each] are about to be multiplied, the first `width` of each head, by
        that head's matrix of a tensor; length, offset: as for `add`."""
        name = self.sharing([tensor], values)
        if name is None:
            return
        count, columns = values.shape
        if name not in self._sums:
            picks = np.arange(columns).reshape(heads, -1)[:, :width].ravel()
            self._sums[name] = _Sums(self._array(1, columns), picks, None, None)
        self._counts[name] = self._counts.get(name, 0) + count
        self._launcher.launch(
            SQUARES,
            "add_float_squares",
            grid=-(-columns // _COLUMNS),
            x=values,
            stride=columns,
            columns=columns,
            rows=count,
            length=length,
            offset=offset % length,
            sums=self._sums[name].array,
        )

    def _array(self, *shape: int) -> DeviceArray:
        array = DeviceArray(int(self._buffer.handle) + self.taken, FLOAT64, shape)
        self.taken += aligned(array.nbytes)
        assert not self.room or self.taken <= self.room, "a rehearsal has found out how much room there must be"
        return array

    def sums(self) -> Mapping[str, Squares]:
        with cuda_errors("reading sums of squares"):
            return {name: self._squares(name, sums) for name, sums in self._sums.items()}

    def _squares(self, name: str, sums: _Sums) -> Squares:
        whole = self._download(sums.array)[:, sums.picks].ravel()
        if sums.scale is not None:
            scale = np.empty(1, np.float32)
            self._gpu.download(scale, sums.scale.address)
            whole /= np.square(scale.astype(np.float64))
        if sums.rows is None:
            return Squares(whole, np.array([self._counts[name]]))
        return Squares(whole, np.rint(self._download(sums.rows)).astype(np.int64))

    def _download(self, array: DeviceArray) -> Float64Array:
        host = np.empty(array.shape, np.float64)
        self._gpu.download(host, array.address)
        return host

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close(self._gpu.stream)
        self._buffer, self.room = None, 0
