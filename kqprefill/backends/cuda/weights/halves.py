"""Matrices that are multiplied as halves, kept so beside their tiles where the plan has room: only the first batch that
meets a product makes its halves, and later ones read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
import math
from typing import Any

from ....errors import BackendError
from ....gguf import ModelTensor
from ..constants import OPERAND_GROUP
from ..device.arrays import FLOAT16, DeviceArray
from ..device.gpu import Gpu
from ..device.workspace import aligned
from .matrix import Matrix


def halves_bytes(tensors: Iterable[ModelTensor]) -> int:
    """What matrices take as halves, at most: their columns are padded to whole groups of an operand's, and so are the
    rows of those whose outputs become an operand."""
    shapes = ((math.prod(stacked), columns) for *stacked, columns in (tensor.shape for tensor in tensors))
    return sum(aligned(FLOAT16.itemsize * _padded(rows) * _padded(columns)) for rows, columns in shapes)


def _padded(count: int) -> int:
    return -(-count // OPERAND_GROUP) * OPERAND_GROUP


@dataclass(frozen=True)
class _Form:
    """What halves are made of, and how: of these matrices' rows one under another, or (gated) by turns; times the scale
    at that address, which holds the same value for as long as the matrices are there; so many rows and columns."""

    matrices: tuple[Matrix, ...]
    gated: bool
    scale: int
    shape: tuple[int, int]


class KeptHalves:
    """What products multiply by, as halves in device memory. What is met first is kept first, as long as there is room.

    nbytes: held. generation: changes whenever some were given back, or there is more room, so that whoever keeps
    addresses (a CUDA graph) can tell.
    """

    def __init__(self, gpu: Gpu, stays: Callable[[Matrix], bool]) -> None:
        """stays(matrix): whether it holds the same weights until the room is taken away; only such are kept."""
        self._gpu, self._stays = gpu, stays
        self._kept: dict[_Form, Any] = {}  # device memory
        self._room = 0
        self.nbytes = self.generation = 0

    def give_room(self, nbytes: int) -> None:
        """Hold at most so many bytes from now on: what was kept last is given back first, once all that was launched
        has read it. 0 gives back all: to be called before memory that matrices are in is freed, or filled with others.
        """
        if nbytes == self._room:
            return
        self._room, before = nbytes, self.nbytes
        self.generation += 1
        self._give_back(nbytes)
        if self.nbytes < before:
            self._gpu.stream.sync()  # then the allocator has it for arrays of any size

    def _give_back(self, most: int) -> None:
        """Free what was kept last until at most so many bytes are held."""
        while self.nbytes > most:
            _, buffer = self._kept.popitem()
            self.nbytes -= buffer.size
            buffer.close(self._gpu.stream)

    def close(self) -> None:
        """Free everything."""
        self._give_back(0)

    def of(
        self,
        matrices: Sequence[Matrix],
        gated: bool,
        scale: DeviceArray,
        shape: tuple[int, int],
        make: Callable[[DeviceArray], None],
    ) -> DeviceArray | None:
        """The halves of matrices, float16 of that shape; make(array) launches what fills it, the first time. None where
        they are not kept.

        gated: gate's and up's rows take turns. scale: what the halves are multiplied by, float32 [1].
        """
        form = _Form(tuple(matrices), gated, scale.address, shape)
        buffer = self._kept[form] if form in self._kept else self._keep(form, make)
        return None if buffer is None else DeviceArray(int(buffer.handle), FLOAT16, shape)

    def _keep(self, form: _Form, make: Callable[[DeviceArray], None]) -> Any:
        """Make a form's halves in memory of their own; None where that may not be."""
        nbytes = aligned(FLOAT16.itemsize * math.prod(form.shape))
        # A graph would make them again each time, in memory that is its own.
        if self.nbytes + nbytes > self._room or self._gpu.capturing or not all(map(self._stays, form.matrices)):
            return None
        try:
            buffer = self._gpu.allocate(nbytes, "weights as halves")
        except BackendError:
            # Others have taken what was free when the room was planned; the batch may need what is held.
            self.give_room(0)
            return None
        try:
            make(DeviceArray(int(buffer.handle), FLOAT16, form.shape))
        except BaseException:
            buffer.close(self._gpu.stream)
            raise
        self._kept[form] = buffer
        self.nbytes += buffer.size
        return buffer
