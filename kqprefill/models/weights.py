"""A GGUF's tensors as a model's page names them: `w.attn_q` is blk.N.attn_q.weight with its bias, checked for shape."""

from dataclasses import dataclass

from ..errors import ModelError
from ..gguf import Tensor
from ..gguf.dequantize import SUPPORTED


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, columns] (y = x · Wᵀ + b) and its bias [rows], where the file has one; experts' matrices [experts, rows,
    columns] and biases; or a vector [n]."""

    tensor: Tensor
    bias: Tensor | None = None

    @property
    def name(self):
        return self.tensor.name

    @property
    def shape(self):
        return self.tensor.shape

    def expert(self, index):
        """One of a stack of matrices [experts, rows, columns]."""
        return Weight(self.tensor.item(index), self.bias and self.bias.item(index))


class Weights:
    """Weights by their GGUF names (without `.weight`), as attributes. Raises ModelError where one is missing."""

    def __init__(self, file, prefix, shapes, parts=None):
        """shapes: name -> shape; a trailing `?` marks one that may be absent. parts: name -> {name: rows}: matrices that the
        file has one under another, which become weights of their own."""
        self._path, self._prefix, self._by_name, self.tensor_names = file.path, prefix, {}, set()
        for name, shape in shapes.items():
            optional = name.endswith("?")
            name = name.rstrip("?")
            tensor = file.tensors.get(f"{prefix}{name}.weight")
            if tensor is None:
                if not optional:
                    raise ModelError(f"{file.path}: tensor {prefix}{name}.weight is missing")
                continue
            bias = file.tensors.get(f"{prefix}{name}.bias") if len(shape) >= 2 else None
            _check(file, tensor, shape)
            if bias is not None:
                _check(file, bias, shape[:-1])
            self.tensor_names |= {t.name for t in (tensor, bias) if t is not None}
            at = 0
            for part, rows in (parts or {}).get(name, {}).items():
                end = at + rows
                self._by_name[part] = Weight(tensor.rows(at, end), bias and bias.rows(at, end))
                at = end
            if not at:
                self._by_name[name] = Weight(tensor, bias)

    def __getattr__(self, name):
        try:
            return self._by_name[name]
        except KeyError:
            raise AttributeError(f"{self._prefix}{name} is not declared in this family's shapes") from None

    def get(self, name):
        """The weight, or None where the file does not have it (names declared with a trailing `?`)."""
        return self._by_name.get(name)

    def __iter__(self):
        return iter(self._by_name.values())


def _check(file, tensor, shape):
    if tensor.type not in SUPPORTED:
        raise ModelError(f"{file.path}: tensor {tensor.name} has type {tensor.type.name}, which is not supported yet")
    if tensor.shape != tuple(shape):
        raise ModelError(
            f"{file.path}: tensor {tensor.name} is {list(tensor.shape)}, but the metadata asks for {list(shape)}"
        )
