"""A synthetic model as a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .file import SyntheticFile


def write_gguf(file: SyntheticFile, path: str | os.PathLike[str]) -> None:
    """Write the file to `path` as GGUF v3, tensor by tensor. Raises OSError."""
    from gguf import GGUFWriter  # late: importing the package takes as long as opening a model does

    writer = GGUFWriter(None, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for tensor in file.tensors.values():
        writer.add_tensor_info(tensor.name, tensor.data.shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]  # GGUFWriter's own way would hold all tensors' data at once
    for tensor in file.tensors.values():
        out.write(b"\0" * (-out.tell() % writer.data_alignment))
        out.write(tensor.data.data)
    out.write(b"\0" * (-out.tell() % writer.data_alignment))
    writer.close()
