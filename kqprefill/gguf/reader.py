"""A GGUF reader that maps the file, checks all that it says, and decodes nothing before it is asked for.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. The file is untrusted: every count, length and offset is
held against the file's size before it is used, so no claim in it can cause a read past the end or a large allocation.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
import mmap
import os
import re
import stat

import numpy as np
from numpy.typing import NDArray

from ..errors import GGUFError
from .keys import described, read_key
from .metadata import Cursor, Metadata
from .model_file import ModelTensor, nbytes_of
from .types import GGML, GGML_QUANT_SIZES

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MOST_FILES = 10000  # of a split model: their names number them with five digits
_OWN_KEYS = frozenset({"split.no", "general.alignment"})  # what each file of a split model has for itself
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = 64 - 1  # GGML_MAX_NAME, with its terminating zero


@dataclass(frozen=True)
class Tensor(ModelTensor):
    """One entry of the tensor table, and the bytes it points at; offset is from the start of the file."""

    _file: GGUFFile = field(kw_only=True)

    @property
    def data(self) -> NDArray[np.uint8]:
        """The quantised bytes, uint8 [..., row bytes]: a view of the mapped file."""
        view = self._file.bytes[self.offset : self.offset + self.nbytes]
        return view.reshape(*self.shape[:-1], nbytes_of(self.shape[-1:], self.type))


class GGUFFile:
    """A GGUF file opened for reading: `metadata` (a mapping) and `tensors` (name -> Tensor).

    The first of a split model's files (`…-00001-of-0000N.gguf`) opens them all, as one. Raises GGUFError, naming the
    file and what is wrong, for anything that is not a well-formed GGUF v2 or v3.
    """

    def __init__(self, path: str | os.PathLike[str], _part: int = 0) -> None:
        """_part: which file of a split model this is; for opening the others."""
        self.path = os.fspath(path)
        self._others: list[GGUFFile] = []
        try:
            # Without waiting, as for a pipe that nobody writes to.
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                    raise self._error(f"{kind}, where a file that can be mapped is wanted; name a GGUF file")
                if status.st_size < 24:
                    raise self._error(f"{status.st_size} bytes are too few for a GGUF header")
                self._map = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:
            raise self._error(getattr(error, "strerror", None) or str(error)) from None
        self.bytes = np.frombuffer(self._map, np.uint8)
        try:
            self._read_header()
            self._open_others(_part)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the file. Tensors' data must not be read afterwards."""
        for other in self._others:
            other.close()
        self.bytes = np.empty(0, np.uint8)
        with suppress(BufferError):  # someone still holds a view: the mapping goes with the last of them
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _error(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what}")

    def _read_header(self) -> None:
        cursor = Cursor(self._map, self._error)
        if (magic := cursor.take(4)) != _MAGIC:
            raise self._error(f"not a GGUF file (it begins with {magic!r}, not {_MAGIC!r})")
        self.version = cursor.u32()
        if self.version not in (2, 3):
            if int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3):
                raise self._error("a big-endian GGUF; convert it to little-endian with gguf_convert_endian.py")
            raise self._error(f"GGUF version {self.version} is not supported (2 and 3 are); convert the model again")
        n_tensors, n_metadata = cursor.count(24, "tensor"), cursor.count(13, "metadata")
        self.metadata = Metadata(cursor, n_metadata)
        alignment = self._key("general.alignment", _DEFAULT_ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment}, not a power of two")
        entries = [self._read_tensor_info(cursor) for _ in range(n_tensors)]
        data_start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        for name, shape, ggml_type, offset, nbytes in entries:
            if name in self.tensors:
                raise self._error(f"tensor {name} is listed twice")
            if offset % alignment:
                raise self._error(f"tensor {name}: offset {offset} is not a multiple of the alignment {alignment}")
            if data_start + offset + nbytes > len(self._map):
                raise self._error(
                    f"tensor {name} ends at byte {data_start + offset + nbytes}, past the file's {len(self._map)}; "
                    "the file is truncated"
                )
            self.tensors[name] = Tensor(name, shape, ggml_type, data_start + offset, _file=self)
        self._refuse_overlaps()

    def _key(self, key: str, default: int) -> int:
        """The value of one of the keys that are counts."""
        value: int = read_key(self.metadata, key, self._error, default)
        return value

    def _refuse_overlaps(self) -> None:
        """No byte of the file belongs to two tensors."""
        before = None
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if before is not None and tensor.offset < before.offset + before.nbytes:
                raise self._error(
                    f"tensor {tensor.name} begins at byte {tensor.offset}, within tensor {before.name}, which ends at "
                    f"byte {before.offset + before.nbytes}; the tensor table is damaged"
                )
            before = tensor

    def _open_others(self, part: int) -> None:
        """The other files of a split model (llama.cpp's gguf-split), whose metadata but for split.* is the first's."""
        count, number = self._key("split.count", 1), self._key("split.no", 0)
        if count <= 1 and not part:
            return
        if number != part or count > _MOST_FILES:
            first = f"; name the first, {self._of_split(0, count)}" if not part else ""
            raise self._error(
                f"this is file {number} (from 0) of {count} of a split model{first}, where {part} is wanted"
            )
        if part:
            return
        for i in range(1, count):
            other = GGUFFile(self._of_split(i, count), i)
            self._others.append(other)
            self._refuse_contradictions(other)
            for name, tensor in other.tensors.items():
                if name in self.tensors:
                    raise other._error(f"tensor {name} is in another file of this split model too")
                self.tensors[name] = tensor
        expected = self._key("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise self._error(f"the {count} files of this split model have {len(self.tensors)} tensors, not {expected}")

    def _refuse_contradictions(self, other: GGUFFile) -> None:
        """What another file of a split model says beside its tensors is what the first says, or nothing."""
        for key in other.metadata:
            if key in self.metadata and key not in _OWN_KEYS:
                here, there = self.metadata[key], other.metadata[key]
                if not np.array_equal(here, there):
                    raise other._error(
                        f"metadata {key} is {described(there)}, but {described(here)} in the first file of this split "
                        "model; the files do not belong together"
                    )

    def _of_split(self, i: int, count: int) -> str:
        """The name of file i (from 0) of a split model."""
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", self.path, re.DOTALL)
        if not match or int(match[2]) != count:
            raise self._error(f"one of {count} files of a split model must be named …-00001-of-{count:05}.gguf")
        return f"{match[1]}-{i + 1:05}-of-{count:05}.gguf"

    def _read_tensor_info(self, cursor: Cursor) -> tuple[str, tuple[int, ...], GGML, int, int]:
        """The next entry of the tensor table: name, shape, type, offset among the tensors' data, bytes."""
        name = cursor.string(_MAX_NAME, "tensor name")
        n_dims = cursor.u32()
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._error(f"tensor {name} has {n_dims} dimensions; 1 to {_MAX_DIMS} are possible")
        ne = [cursor.u64() for _ in range(n_dims)]
        type_id, offset = cursor.u32(), cursor.u64()
        if 0 in ne:
            raise self._error(f"tensor {name} has a dimension of 0")
        try:
            ggml_type = GGML(type_id)
        except ValueError:
            raise self._error(f"tensor {name} has the unknown ggml type {type_id}") from None
        block_elements, _ = GGML_QUANT_SIZES[ggml_type]
        if ne[0] % block_elements:
            raise self._error(
                f"tensor {name}: rows of {ne[0]} are no multiple of {ggml_type.name}'s block of {block_elements}"
            )
        shape = tuple(reversed(ne))
        return name, shape, ggml_type, offset, nbytes_of(shape, ggml_type)
