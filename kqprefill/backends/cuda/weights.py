"""A model's weights on the device: matrices as the file has them, vectors in float32, and the scales of half precision."""

from collections import deque
from dataclasses import dataclass
import math
import time

import numpy as np

from ...errors import BackendError
from ...gguf import dequantize
from .memory import aligned, gib
from .staging import STAGING_BYTES, STAGING_SLOTS, Piece, Staging, pieces_of
from .tiles import K_MULTIPLE, TILE_ROWS, unit_size

_MOST_COLUMNS = 1 << 19  # a tile of rows must fit the upload and scratch buffers


@dataclass(frozen=True)
class Matrix:
    """Quantised rows in device memory, in the tiles of kernels/quants/common.cuh."""

    name: str
    type: object  # GGMLQuantizationType
    address: int
    rows: int
    columns: int

    @property
    def units(self):
        """Units in a row, the last perhaps padded."""
        return -(-self.columns // unit_size(self.type)[0])

    @property
    def row_tile_bytes(self):
        return TILE_ROWS * self.units * unit_size(self.type)[1]

    @property
    def row_tiles(self):
        return -(-self.rows // TILE_ROWS)

    @property
    def nbytes(self):
        return self.row_tiles * self.row_tile_bytes


def matrix_of(tensor, address=0):
    """A tensor as a Matrix; a stack of matrices as one, the rows of each under those of the one before."""
    *stacked, columns = tensor.shape
    return Matrix(tensor.name, tensor.type, address, math.prod(stacked), columns)


def layer_tensors(family):
    """The matrices' tensors of each layer."""
    return [[w.tensor for w in block if len(w.shape) >= 2] for block in family.blocks]


def tile_bytes(tensors):
    """What they take in device memory together."""
    return sum(aligned(matrix_of(tensor).nbytes) for tensor in tensors)


class DeviceWeights:
    """A model's tensors on the device: those of a Plan's resident layers, and of the layer that is computed.

    plan: what is placed; None where placing has failed. loaded: (bytes, seconds) of the last upload of weights that stay.
    """

    plan = None

    def __init__(self, gpu, kernels, family):
        self._gpu, self._kernels, self._family = gpu, kernels, family
        self._buffers = {}  # "output", "embedding", a layer or "streamed": device memory
        self._matrices, self._vectors, self._made, self._spans = {}, {}, {}, []
        self._staging, self._coming = None, deque()
        self._absmax = {}
        self._pieces = {}  # streamed layer: its Pieces
        for weight in family.matrices():
            matrix = matrix_of(weight.tensor)
            if TILE_ROWS * weight.tensor.nbytes // matrix.rows > STAGING_BYTES or matrix.columns > _MOST_COLUMNS:
                raise BackendError(
                    f"tensor {weight.name}: rows of {matrix.columns} are too long for CUDA; use --backend cpu"
                )
            if len(weight.shape) == 3 and weight.shape[1] % K_MULTIPLE:
                raise BackendError(
                    f"tensor {weight.name}: experts of {weight.shape[1]} rows, no multiple of {K_MULTIPLE}, do not run on CUDA; "
                    "use --backend cpu"
                )

    def place(self, plan, progress):
        """Make the device hold what the plan says; progress("load", done, total) hears of what is uploaded."""
        self._stop_streaming()
        self.plan = None
        for layer in plan.streamed:
            if layer in self._buffers:
                self._buffers.pop(layer).close(self._gpu.stream)
        family, layers = self._family, layer_tensors(self._family)
        groups = {"output": [family.output.tensor], "embedding": [family.token_embd.tensor], **dict(enumerate(layers))}
        if plan.streamed or family.output is family.token_embd:
            del groups["embedding"]
            if plan.streamed and family.output is not family.token_embd:
                self._matrices.pop(family.token_embd.name, None)
            if buffer := self._buffers.pop("embedding", None):
                buffer.close(self._gpu.stream)
        missing = [key for key in groups if key not in self._buffers and key not in plan.streamed]
        begin = time.perf_counter()
        self._staging = Staging(self._gpu, self._kernels, STAGING_SLOTS, plan.slot_bytes, plan.host_bytes)
        try:
            self._load([(key, groups[key]) for key in missing], plan.slot_bytes, progress)
        except BaseException:
            for key in missing:  # whatever has come of them
                if buffer := self._buffers.pop(key, None):
                    buffer.close(self._gpu.stream)
            raise
        if not plan.streamed:
            self._staging.end()
        self._gpu.stream.sync()
        self.loaded = sum(t.nbytes for key in missing for t in groups[key]), time.perf_counter() - begin
        if plan.streamed:
            self._buffers["streamed"] = buffer = self._gpu.allocate(plan.tile_bytes, "a streamed layer")
        for layer in plan.streamed:
            matrices = self._lay_out(layers[layer], int(buffer.handle))
            self._pieces[layer] = [Piece(m, 0, t.data.reshape(m.rows, -1)) for t, m in zip(layers[layer], matrices)]
        self.plan = plan

    def settle(self):
        """Unlock the host's pages that only loading read. It takes 10 ms a gigabyte, which a first batch need not wait for."""
        if self._staging is not None and not self.streaming:
            self._staging.close()
            self._staging = None

    def _load(self, groups, room, progress):
        """Upload tensors that stay, each group's into one allocation."""
        total, done, batch, filled = sum(t.nbytes for _, tensors in groups for t in tensors), 0, [], 0
        to_read = deque(t.data for _, tensors in groups for t in tensors)

        def send():
            nonlocal done
            while to_read and self._staging.read_ahead(to_read[0]):
                to_read.popleft()
            self._staging.unpack(self._staging.bring(batch))
            done += sum(piece.data.nbytes for piece in batch)
            progress("load", done, total)

        for key, tensors in groups:
            self._buffers[key] = buffer = self._gpu.allocate(tile_bytes(tensors), f"weights ({gib(total)} in all)")
            for tensor, matrix in zip(tensors, self._lay_out(tensors, int(buffer.handle))):
                for piece in pieces_of(matrix, tensor.data, min(room, STAGING_BYTES)):
                    if filled + aligned(piece.data.nbytes) > room:
                        send()
                        batch, filled = [], 0
                    batch.append(piece)
                    filled += aligned(piece.data.nbytes)
        if batch:
            send()

    def _lay_out(self, tensors, address):
        """The Matrix of each, one after another from `address`; known from then on."""
        for tensor in tensors:
            matrix = self._matrices[tensor.name] = matrix_of(tensor, address)
            address += aligned(matrix.nbytes)
        return [self._matrices[tensor.name] for tensor in tensors]

    # streaming --------------------------------------------------------------------------------------------------------

    @property
    def streaming(self):
        return self.plan is not None and bool(self.plan.streamed)

    def on_host(self, weight):
        """Whether a matrix (the embedding) is not on the device at all."""
        return weight.name not in self._matrices

    def host_rows(self, weight, rows):
        """Those rows of a matrix as GGUF stores them, on the host: uint8 [rows, row bytes]."""
        return weight.tensor.data[rows]

    def begin_layer(self, index):
        """Launch what has a layer's matrices ready, if it is streamed."""
        self.prefetch()
        if index not in self._pieces:
            return
        if self._coming[0][0] != index:  # an earlier batch broke off
            self._coming.clear()
            self._next = self.plan.streamed.index(index)
            self.prefetch()
        self._staging.unpack(self._coming.popleft()[1])

    def prefetch(self):
        """Launch the copies of the next layers that are streamed, as many as there is room for. To be called once all that
        is to run before them has been launched."""
        while self._pieces and len(self._coming) < STAGING_SLOTS:
            layer = self.plan.streamed[self._next]
            self._next = (self._next + 1) % len(self.plan.streamed)
            following = self.plan.streamed[(self._next + 1) % len(self.plan.streamed)]
            for piece in self._pieces[following]:
                self._staging.read_ahead(piece.data)
            self._coming.append((layer, self._staging.bring(self._pieces[layer])))

    def _stop_streaming(self):
        self._coming.clear()
        self._pieces.clear()
        self._next = 0
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        if buffer := self._buffers.pop("streamed", None):
            buffer.close(self._gpu.stream)

    # what the ops ask for ---------------------------------------------------------------------------------------------

    def matrix(self, weight):
        return self._matrices[weight.name]

    def vector(self, *tensors):
        """(device address, host copy) of 1-D tensors one after another, as float32; uploaded when first asked for.

        A length stands for that many zeros: an absent bias beside present ones.
        """
        key = tuple(t if isinstance(t, int) else t.name for t in tensors)
        if key not in self._vectors:
            parts = [np.zeros(t, np.float32) if isinstance(t, int) else dequantize(t.data, t.type) for t in tensors]
            host = np.concatenate(parts)
            address = self._reserve(host.nbytes)
            self._gpu.upload(address, host)
            self._vectors[key] = address, host
        return self._vectors[key]

    def absmax(self, weight):
        """The largest magnitude in a matrix, on the host; found when first asked for (a second a billion weights)."""
        if weight.name not in self._absmax:
            step = max(1, (1 << 24) // weight.shape[1])
            data, kind = weight.tensor.data, weight.tensor.type
            parts = (dequantize(data[at : at + step], kind) for at in range(0, weight.shape[0], step))
            self._absmax[weight.name] = max(float(np.abs(part).max()) for part in parts)
        return self._absmax[weight.name]

    def scale(self, key, make):
        """Device address of the float32 scale called `key`; make(address) fills it, the first time."""
        return self._once(key, 4, make)

    def _once(self, key, nbytes, make):
        address = self._made.get(key)
        if address is None:
            address = self._reserve(nbytes)
            make(address)
            self._made[key] = address
        return address

    def descriptor(self, key, make):
        """Device address of the 128-byte TMA descriptor called `key`; make(address) fills it, the first time."""
        return self._once(("descriptor", key), 128, make)

    def constant(self, array):
        """Device address of a host array's values, uploaded when first asked for."""
        return self._once(array.tobytes(), array.nbytes, lambda address: self._gpu.upload(address, array))

    def constant_scale(self, bound):
        """Device address of the power of two for values of at most `bound`: scales.cu's scale_for, on the host."""

        def upload(address):
            exponent = 15 - math.frexp(bound)[1] if bound > 0 else 0
            self._gpu.upload(address, np.array([2.0 ** max(-126, min(126, exponent))], np.float32))

        return self.scale(("constant", float(bound)), upload)

    def _reserve(self, nbytes):
        """A little device memory, cut from spans of 1 MiB."""
        nbytes = aligned(nbytes)
        if not self._spans or self._spans[-1][1] < nbytes:
            buffer = self._gpu.allocate(max(nbytes, 1 << 20), "norms, biases and scales")
            self._buffers[f"span {len(self._spans)}"] = buffer
            self._spans.append([int(buffer.handle), buffer.size])
        span = self._spans[-1]
        address = span[0]
        span[0], span[1] = address + nbytes, span[1] - nbytes
        return address

    def close(self):
        self._stop_streaming()
        for buffer in self._buffers.values():
            buffer.close(self._gpu.stream)
        self._buffers.clear()
