"""Which model it is, and how precisely it computes: what a folder's results have in common."""

from __future__ import annotations

from collections import Counter
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..gguf import ModelFile

_SAMPLE = 1024  # bytes of each tensor that its model's digest has
_ACTIVATIONS = {"cpu": "float32", "cuda": "float16"}  # operands of exact products; sums are float32


def model_of(file: ModelFile) -> dict[str, Any]:
    """A model for a manifest: its path, architecture, bytes of tensors, and a digest.

    The digest (SHA-256) is of the tensors' names, shapes and types, of the metadata, and of 1 KiB from the middle of
    each tensor's data: to read all of a large file would take longer than to load it. Models of one shape differ there,
    and a copy of a file has the same wherever it is.
    """
    digest = hashlib.sha256()
    for key, value in sorted(file.metadata.items()):
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        digest.update(f"{key}={plain!r}\n".encode("utf-8", "surrogatepass"))
    nbytes = 0
    for name, tensor in sorted(file.tensors.items()):
        data = tensor.data.reshape(-1)
        middle = data[len(data) // 2 :][:_SAMPLE]
        digest.update(f"{name} {tensor.shape} {tensor.type.name}\n".encode("utf-8", "surrogatepass"))
        digest.update(middle.tobytes())
        nbytes += tensor.nbytes
    architecture = file.metadata.get("general.architecture")
    return {"path": file.path, "architecture": architecture, "bytes": nbytes, "digest": digest.hexdigest()}


def precision_of(file: ModelFile, backend: str, kernels: str, precision: str) -> dict[str, Any]:
    """How precisely a backend ("cpu" or "cuda") computes a file's model: the types of its tensors with how many there
    are of each, and of the operands of products: "int8" where the layers' large matrices are multiplied so."""
    weights = Counter(tensor.type.name for tensor in file.tensors.values())
    own = {"backend": backend, "kernels": kernels if backend == "cuda" else None}
    activations = _ACTIVATIONS[backend] if precision == "exact" else precision
    return own | {"activations": activations, "weights": dict(sorted(weights.items()))}
