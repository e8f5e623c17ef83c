"""A model's weights on the device: matrices as the file has them, in tiles, or in int8; those that are streamed come
layer by layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ....core import Progress
from ....errors import BackendError
from ....gguf import ModelTensor, dequantize
from ....models.family import Family
from ....models.precision import Precision
from ....models.weights import Weight
from ...base import Loaded
from ...budget import gib
from ..constants import TILE_ROWS
from ..device.gpu import Gpu
from ..device.launcher import Launches
from ..device.workspace import aligned
from .halves import KeptHalves
from .matrix import Matrix, layer_matrices, matrix_of, tile_bytes
from .plan import Plan
from .staging import STAGING_BYTES, STAGING_SLOTS, Brought, Piece, Staging, pieces_of, scratch_bytes

_MOST_COLUMNS = 1 << 19  # a tile of rows must fit the upload and scratch buffers


class WeightStore(Protocol):
    """What the ops ask for: a WeightsOnDevice, or what stands in for it in a rehearsal."""

    @property
    def precision(self) -> Precision:
        """What the model was opened with."""

    @property
    def streaming(self) -> bool:
        """Whether some layers are streamed."""

    @property
    def halves(self) -> KeptHalves | None:
        """What is kept of the matrices as halves; None in a rehearsal, where nothing is."""

    def matrix(self, weight: Weight) -> Matrix:
        """A matrix of a layer that is there: one that stays, or the layer that has begun."""

    def on_host(self, weight: Weight) -> bool:
        """Whether a matrix (the embedding) is not on the device at all."""

    def host_rows(self, weight: Weight, rows: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Those rows of a matrix as GGUF stores them, on the host: uint8 [rows, row bytes]."""

    def absmax(self, weight: Weight) -> float:
        """The largest magnitude in a matrix, on the host; found when first asked for (a second a billion weights)."""

    def begin_layer(self, index: int) -> None:
        """Launch what has a layer's matrices ready, if it is streamed."""

    def prefetch(self) -> None:
        """Launch the copies of the next layers that are streamed, as many as there is room for.

        To be called once all that is to run before them has been launched.
        """


class WeightsOnDevice:
    """A WeightStore of the matrices that a Plan places.

    plan: what is placed; None where placing has failed. loaded: the last upload of weights that stay. halves: what is
    kept of matrices as halves.
    """

    plan: Plan | None = None
    loaded: Loaded | None = None

    def __init__(self, gpu: Gpu, launcher: Launches, family: Family, precision: Precision = "exact") -> None:
        self.precision: Precision = precision
        self._gpu, self._launcher, self._family = gpu, launcher, family
        self._buffers: dict[str | int, Any] = {}  # "output", "embedding", a layer or "streamed": device memory
        self._matrices: dict[str, Matrix] = {}
        self._staging: Staging | None = None
        self._pieces: dict[int, list[Piece]] = {}  # of each streamed layer
        self._coming: deque[tuple[int, Brought]] = deque()  # streamed layers whose copies have been launched
        self._next = 0  # which of the plan's streamed layers is copied next
        self._absmax: dict[str, float] = {}
        self.halves = KeptHalves(gpu, self._stays)
        _refuse_misshapen(family)

    def place(self, plan: Plan, progress: Progress) -> None:
        """Make the device hold what the plan says; progress("load", done, total) hears of what is uploaded."""
        self.halves.give_room(0)
        self._stop_streaming()
        self.plan = None
        for layer in plan.streamed:
            self._free(layer)
        groups = self._groups(plan)
        missing = [key for key in groups if key not in self._buffers and key not in plan.streamed]
        begin = time.perf_counter()
        scratch = scratch_bytes((tensor for tensors in groups.values() for tensor in tensors), self.precision)
        self._staging = Staging(self._gpu, self._launcher, STAGING_SLOTS, plan.slot_bytes, plan.host_bytes, scratch)
        try:
            self._load({key: groups[key] for key in missing}, plan.slot_bytes, progress)
        except BaseException:
            for key in missing:  # whatever has come of them
                self._free(key)
            raise
        if not plan.streamed:
            self._staging.end()
        self._gpu.stream.sync()
        self.loaded = Loaded(sum(t.nbytes for key in missing for t in groups[key]), time.perf_counter() - begin)
        if plan.streamed:
            self._buffers["streamed"] = buffer = self._gpu.allocate(plan.tile_bytes, "a streamed layer")
            for layer in plan.streamed:
                matrices = self._assign(groups[layer], int(buffer.handle))
                self._pieces[layer] = [
                    piece for t, m in zip(groups[layer], matrices) for piece in pieces_of(m, t.data, plan.slot_bytes)
                ]
        self.plan = plan
        self.halves.give_room(plan.halves_bytes)

    def _stays(self, matrix: Matrix) -> bool:
        """Whether a matrix, or the stack that it is the first of, is where `place` has put it until the next time."""
        own = self._matrices.get(matrix.name)
        return not self.streaming and own is not None and own.address == matrix.address

    def _groups(self, plan: Plan) -> dict[str | int, list[ModelTensor]]:
        """The tensors that share an allocation on this device, by what it is called; an embedding that is not to be on
        the device is forgotten."""
        family, share, layers = self._family, plan.share, layer_matrices(self._family)
        groups: dict[str | int, list[ModelTensor]] = {"output": share.outside(family)}
        if share.holds_embedding(family) and not plan.streamed:
            groups["embedding"] = [family.token_embd.tensor]
        else:
            self._free("embedding")
            if family.token_embd.name not in {tensor.name for tensor in groups["output"]}:
                self._matrices.pop(family.token_embd.name, None)
        return {**groups, **{layer: layers[layer] for layer in share.layers}}

    def settle(self) -> None:
        """Unlock the host's pages that only loading read. It takes 10 ms a gigabyte, which a first batch need not wait
        for."""
        if self._staging is not None and not self.streaming:
            self._staging.close()
            self._staging = None

    def _load(self, groups: dict[str | int, list[ModelTensor]], room: int, progress: Progress) -> None:
        """Upload tensors that stay, each group's into one allocation."""
        staging = self._staging
        assert staging is not None
        total, done, filled = sum(t.nbytes for tensors in groups.values() for t in tensors), 0, 0
        batch: list[Piece] = []
        to_read = deque(t.stored for tensors in groups.values() for t in tensors)

        def send(pieces: Sequence[Piece]) -> None:
            nonlocal done
            while to_read and staging.read_ahead(to_read[0]):
                to_read.popleft()
            staging.unpack(staging.bring(pieces))
            done += sum(piece.data.nbytes for piece in pieces)
            progress("load", done, total)

        for key, tensors in groups.items():
            what = f"weights ({gib(total)} in all)"
            self._buffers[key] = buffer = self._gpu.allocate(tile_bytes(tensors, self.precision), what)
            for tensor, matrix in zip(tensors, self._assign(tensors, int(buffer.handle))):
                for piece in pieces_of(matrix, tensor.data, min(room, STAGING_BYTES)):
                    if filled + aligned(piece.data.nbytes) > room:
                        send(batch)
                        batch, filled = [], 0
                    batch.append(piece)
                    filled += aligned(piece.data.nbytes)
        if batch:
            send(batch)

    def _assign(self, tensors: Sequence[ModelTensor], address: int) -> list[Matrix]:
        """The Matrix of each, one after another from `address`; `matrix` knows them from then on."""
        matrices = []
        for tensor in tensors:
            matrix = self._matrices[tensor.name] = matrix_of(tensor, address, self.precision)
            matrices.append(matrix)
            address += aligned(matrix.nbytes)
        return matrices

    def _free(self, key: str | int) -> None:
        if buffer := self._buffers.pop(key, None):
            buffer.close(self._gpu.stream)

    # streaming --------------------------------------------------------------------------------------------------------

    @property
    def streaming(self) -> bool:
        return self.plan is not None and bool(self.plan.streamed)

    def begin_layer(self, index: int) -> None:
        self.prefetch()
        if index not in self._pieces:
            return
        assert self._staging is not None and self.plan is not None
        if self._coming[0][0] != index:  # an earlier batch broke off
            self._coming.clear()
            self._next = self.plan.streamed.index(index)
            self.prefetch()
        self._staging.unpack(self._coming.popleft()[1])

    def prefetch(self) -> None:
        if not self._pieces:
            return
        assert self._staging is not None and self.plan is not None
        while len(self._coming) < STAGING_SLOTS:
            layer = self.plan.streamed[self._next]
            self._next = (self._next + 1) % len(self.plan.streamed)
            following = self.plan.streamed[(self._next + 1) % len(self.plan.streamed)]
            for piece in self._pieces[following]:
                self._staging.read_ahead(piece.data)
            self._coming.append((layer, self._staging.bring(self._pieces[layer])))

    def _stop_streaming(self) -> None:
        self._coming.clear()
        self._pieces.clear()
        self._next = 0
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._free("streamed")

    # what the ops ask for ---------------------------------------------------------------------------------------------

    def matrix(self, weight: Weight) -> Matrix:
        return self._matrices[weight.name]

    def on_host(self, weight: Weight) -> bool:
        return weight.name not in self._matrices

    def host_rows(self, weight: Weight, rows: NDArray[np.int32]) -> NDArray[np.uint8]:
        return weight.tensor.data[rows]

    def absmax(self, weight: Weight) -> float:
        if weight.name not in self._absmax:
            step = max(1, (1 << 24) // weight.shape[1])
            data, kind = weight.tensor.data, weight.tensor.type
            parts = (dequantize(data[at : at + step], kind) for at in range(0, weight.shape[0], step))
            self._absmax[weight.name] = max(float(np.abs(part).max()) for part in parts)
        return self._absmax[weight.name]

    def close(self) -> None:
        """Free everything."""
        self.halves.close()
        self._stop_streaming()
        for key in list(self._buffers):
            self._free(key)


def _refuse_misshapen(family: Family) -> None:
    """Raises BackendError for a matrix whose shape the kernels do not take."""
    for weight in family.matrices():
        matrix = matrix_of(weight.tensor)
        if TILE_ROWS * weight.tensor.nbytes // matrix.rows > STAGING_BYTES or matrix.columns > _MOST_COLUMNS:
            raise BackendError(
                f"tensor {weight.name}: rows of {matrix.columns} are too long for CUDA; use --backend cpu"
            )
        if "_exps" in weight.name and weight.shape[1] % TILE_ROWS:
            raise BackendError(
                f"tensor {weight.name}: experts of {weight.shape[1]} rows, no multiple of {TILE_ROWS}, "
                "do not run on CUDA; use --backend cpu"
            )
