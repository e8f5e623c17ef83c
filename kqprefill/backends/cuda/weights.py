"""A model's weights on the device: matrices as the file has them, vectors in float32, and the scales of half precision."""

from ctypes import c_int32 as i32
from dataclasses import dataclass, replace
from functools import partial
import math

import numpy as np

from ...errors import BackendError
from ...gguf import dequantize
from .kernels import weight_program
from .memory import Uploader, aligned
from .tiles import TILE_ROWS, unit_size

_RAW_BYTES = 64 << 20  # of a matrix as the file has it, on the device at a time while it is repacked
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


class DeviceWeights:
    """Every tensor of a model, uploaded once, each block's in one allocation."""

    def __init__(self, gpu, kernels, family, progress):
        self._gpu, self._buffers, self._matrices, self._vectors = gpu, [], {}, {}
        self._made, self._spans = {}, []
        groups = [[family.token_embd, family.output_norm, family.output], *family.blocks]
        matrices = [{w.name: w.tensor for w in group if len(w.shape) == 2}.values() for group in groups]
        total = sum(tensor.nbytes for group in matrices for tensor in group)
        done = 0
        raw = gpu.allocate(_RAW_BYTES, "upload")
        uploader = Uploader(gpu, total)
        try:
            for tensors in matrices:
                placed = [Matrix(t.name, t.type, 0, *t.shape) for t in tensors]
                room = sum(aligned(m.nbytes) for m in placed)
                buffer = gpu.allocate(room, f"weights ({total / 2**30:.2f} GiB in all)")
                self._buffers.append(buffer)
                address = int(buffer.handle)
                for tensor, matrix in zip(tensors, placed):
                    matrix = self._matrices[tensor.name] = replace(matrix, address=address)
                    address += aligned(matrix.nbytes)
                    self._upload(uploader, kernels, tensor, matrix, int(raw.handle))
                    done += tensor.nbytes
                    progress("load", done, total)
            uploader.finish()
        finally:
            uploader.close()
            raw.close(gpu.stream)

    def _upload(self, uploader, kernels, tensor, matrix, raw):
        """Copy a tensor's rows, as many at a time as there is room for, and repack them into tiles."""
        row_bytes, data = tensor.nbytes // matrix.rows, tensor.data
        step = _RAW_BYTES // row_bytes // TILE_ROWS * TILE_ROWS
        if step == 0 or matrix.columns > _MOST_COLUMNS:
            raise BackendError(
                f"tensor {tensor.name}: rows of {matrix.columns} are too long for CUDA; use --backend cpu"
            )
        for first in range(0, matrix.rows, step):
            rows = min(step, matrix.rows - first)
            tiles = matrix.address + first // TILE_ROWS * matrix.row_tile_bytes
            grid = (-(-matrix.row_tile_bytes // 512), -(-rows // TILE_ROWS))
            arguments = raw, row_bytes, i32(rows), tiles, i32(matrix.units)
            uploader.copy(data[first : first + rows], raw)
            uploader.then(partial(kernels.launch, weight_program(matrix.type), "repack", grid, 256, *arguments))

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
            self._buffers.append(buffer)
            self._spans.append([int(buffer.handle), buffer.size])
        span = self._spans[-1]
        address = span[0]
        span[0], span[1] = address + nbytes, span[1] - nbytes
        return address

    def close(self):
        for buffer in self._buffers:
            buffer.close(self._gpu.stream)
        self._buffers.clear()
