"""A model's weights on the device: matrices as the file has them, vectors in float32, and the scales of half precision."""

from dataclasses import dataclass
import math

import numpy as np

from ...gguf import dequantize
from .memory import Uploader, aligned


@dataclass(frozen=True)
class Matrix:
    """Quantised rows in device memory."""

    name: str
    type: object  # GGMLQuantizationType
    address: int
    rows: int
    columns: int
    row_bytes: int


class DeviceWeights:
    """Every tensor of a model, uploaded once, each block's in one allocation."""

    def __init__(self, gpu, family, progress):
        self._gpu, self._buffers, self._matrices, self._vectors = gpu, [], {}, {}
        self._scales, self._spans = {}, []
        groups = [[family.token_embd, family.output_norm, family.output], *family.blocks]
        matrices = [[w.tensor for w in group if len(w.shape) == 2] for group in groups]
        total = sum(tensor.nbytes for group in matrices for tensor in group)
        items = []
        for index, tensors in enumerate(matrices):
            tensors = list({tensor.name: tensor for tensor in tensors}.values())  # a tied output stands twice
            buffer = gpu.allocate(sum(aligned(t.nbytes) for t in tensors), f"weights ({total / 2**30:.2f} GiB in all)")
            self._buffers.append(buffer)
            address = int(buffer.handle)
            for tensor in tensors:
                rows, columns = tensor.shape
                self._matrices[tensor.name] = Matrix(
                    tensor.name, tensor.type, address, rows, columns, tensor.nbytes // rows
                )
                items.append((tensor.data, address))
                address += aligned(tensor.nbytes)
        uploader = Uploader(gpu)
        try:
            uploader.copy(items, lambda done: progress("load", done, total))
        finally:
            uploader.close()

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
        if key not in self._scales:
            address = self._reserve(4)
            make(address)
            self._scales[key] = address
        return self._scales[key]

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
