"""Matrices side by side of which some are in int8 and others are not (models/precision.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from ..device.arrays import UINT8, DeviceArray
from ..device.launcher import Launches
from ..device.workspace import Workspace
from ..weights.matrix import Matrix
from ..weights.staging import make_int8
from .operand import Gemm, Groups, Operand


class MixedGemm(Gemm):
    """Each run of matrices that are alike is multiplied by itself, into its own columns. Gate and up, which one product
    takes, are both multiplied in int8; a file where only one of them is quantised is rare.

    choose: the way for matrices that are alike.
    """

    def __init__(self, choose: Callable[[Sequence[Matrix]], Gemm], launcher: Launches, work: Workspace) -> None:
        self._choose, self._launcher, self._work = choose, launcher, work

    def group_rows(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> int:
        assert gated, "only gate and up are stacks side by side"
        alike = [replace(matrix, int8=True) for matrix in matrices]
        return self._choose(alike).group_rows(m, alike, True, experts)

    def linear(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        add: bool,
        groups: Groups | None = None,
        out_scale: DeviceArray | None = None,
        ldo: int | None = None,
    ) -> None:
        assert groups is None, "only gate and up are stacks side by side"
        width = ldo or sum(matrix.rows for matrix in matrices)
        for first, run in _runs(matrices):
            to, its_bias = out.columns(first), None if bias is None else bias.rows(first)
            self._choose(run).linear(a, run, to, weight_scale, its_bias, add, ldo=width)

    def activated(
        self,
        a: Operand,
        matrix: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        bias: DeviceArray | None,
        activation: str,
    ) -> None:
        raise AssertionError("one matrix is of one kind")

    def gated(
        self,
        a: Operand,
        gate: Matrix,
        up: Matrix,
        act: Operand,
        weight_scale: DeviceArray,
        biases: tuple[DeviceArray | None, DeviceArray | None],
        activation: str,
        groups: Groups | None = None,
    ) -> None:
        gate, up = self._in_int8(gate), self._in_int8(up)
        self._choose([gate, up]).gated(a, gate, up, act, weight_scale, biases, activation, groups)

    def _in_int8(self, matrix: Matrix) -> Matrix:
        """The same matrix in int8, or the first of the same stack, which is made so in work memory where it is not."""
        if matrix.int8:
            return matrix
        stack = replace(matrix, rows=matrix.rows * matrix.stacked, stacked=1)
        made = replace(stack, int8=True)
        made = replace(made, address=self._work.array("gate or up in int8", UINT8, made.nbytes).address)
        make_int8(self._launcher, stack, made)
        self._launcher.fence()  # GEMMs read weights without waiting for the kernel before them
        return made.one_of(matrix.stacked)


def _runs(matrices: Sequence[Matrix]) -> Iterator[tuple[int, list[Matrix]]]:
    """Neighbours that are all in int8, or all not, with the first of their columns."""
    first = 0
    for _, alike in groupby(matrices, lambda matrix: matrix.int8):
        run = list(alike)
        yield first, run
        first += sum(matrix.rows for matrix in run)
