"""Arrays as files that other tools read: .npy (one array), .npz and .safetensors (several, by name)."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError
from .outputs import STDIO

if TYPE_CHECKING:
    import numpy as np

FORMATS = (".npy", ".npz", ".safetensors")
_DTYPES = {"float32": "F32", "int32": "I32"}  # of safetensors


def check_arrays_path(path: str, option: str) -> None:
    """Raises InputError for a path whose ending says no format; stdout, pipes and devices need not say one."""
    if path == STDIO or path.lower().endswith(FORMATS) or (os.path.exists(path) and not os.path.isfile(path)):
        return
    raise InputError(f"{option} {path}: the name of an array's file ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def write_arrays(file: BinaryIO, path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write {name: array} to a binary file, in the format that path's ending says: .npz, .safetensors, or (pipes and
    devices have no ending) .npy, which has the first array only."""
    import numpy as np

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if path.lower().endswith(".npz"):
        by_name: dict[str, Any] = {**arrays}  # NumPy's own options have types too
        np.savez(file, **by_name)
    elif path.lower().endswith(".safetensors"):
        _write_safetensors(file, arrays)
    else:
        first = next(iter(arrays.values()))
        # Not np.save, which asks a pipe for its position.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(first))
        file.write(first.data)


def _write_safetensors(file: BinaryIO, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """https://huggingface.co/docs/safetensors: the header's length, the header, the arrays one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        file.write(array.data)
