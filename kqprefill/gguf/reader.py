"""A GGUF reader that maps the file, checks all that it says, and decodes nothing before it is asked for.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. The file is untrusted: every count, length and offset is
held against the file's size before it is used, so no claim in it can cause a read past the end or a large allocation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
import mmap
import os
import re
import struct

import numpy as np

from ..errors import GGUFError
from .types import GGML, GGML_QUANT_SIZES

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MOST_FILES = 10000  # of a split model, which leaves room for their numbers
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = 64 - 1  # GGML_MAX_NAME, with its terminating zero
_MAX_KEY = 65535

# gguf_type: value -> (name, struct code, bytes)
_SCALARS = {
    0: ("uint8", "B", 1),
    1: ("int8", "b", 1),
    2: ("uint16", "H", 2),
    3: ("int16", "h", 2),
    4: ("uint32", "I", 4),
    5: ("int32", "i", 4),
    6: ("float32", "f", 4),
    7: ("bool", "?", 1),
    10: ("uint64", "Q", 8),
    11: ("int64", "q", 8),
    12: ("float64", "d", 8),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table, and the bytes it points at.

    shape is in NumPy's order (slowest first: a matrix is [rows, columns]), the reverse of GGUF's ne[].
    """

    name: str
    shape: tuple[int, ...]
    type: GGML
    offset: int  # from the start of the file
    nbytes: int
    _file: "GGUFFile"

    @property
    def data(self):
        """The quantised bytes, uint8 [..., row bytes]: a view of the mapped file."""
        block_elements, block_bytes = GGML_QUANT_SIZES[self.type]
        row = self.shape[-1] // block_elements * block_bytes
        return self._file.bytes[self.offset : self.offset + self.nbytes].reshape(*self.shape[:-1], row)

    def item(self, index):
        """One of a stack: what stands at that index of the first dimension, as a tensor of its own."""
        size = self.nbytes // self.shape[0]
        name, shape = f"{self.name}[{index}]", self.shape[1:]
        return replace(self, name=name, shape=shape, offset=self.offset + index * size, nbytes=size)

    def rows(self, begin, end):
        """Those rows of a matrix, as a tensor of their own."""
        row = self.nbytes // self.shape[0]
        name, shape = f"{self.name}[{begin}:{end}]", (end - begin, *self.shape[1:])
        return replace(self, name=name, shape=shape, offset=self.offset + begin * row, nbytes=(end - begin) * row)


class GGUFFile:
    """A GGUF file opened for reading: `metadata` (a mapping) and `tensors` (name -> Tensor).

    The first of a split model's files (`…-00001-of-0000N.gguf`) opens them all, as one. Raises GGUFError, naming the file and
    what is wrong, for anything that is not a well-formed GGUF v2 or v3.
    """

    def __init__(self, path, _part=0):
        self.path, self._others = os.fspath(path), []
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise self._error(f"{size} bytes are too few for a GGUF header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._error(getattr(error, "strerror", None) or str(error)) from None
        self.bytes = np.frombuffer(self._map, np.uint8)
        try:
            self._read_header()
            self._open_others(_part)
        except BaseException:
            self.close()
            raise

    def close(self):
        """Unmap the file. Tensors' data must not be read afterwards."""
        for other in self._others:
            other.close()
        self.bytes = None
        try:
            self._map.close()
        except BufferError:  # someone still holds a view: the mapping goes with the last of them
            pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _error(self, what):
        return GGUFError(f"{self.path}: {what}")

    def _read_header(self):
        cursor = _Cursor(self._map, self._error)
        if (magic := cursor.take(4)) != _MAGIC:
            raise self._error(f"not a GGUF file (it begins with {magic!r}, not {_MAGIC!r})")
        self.version = cursor.u32()
        if self.version not in (2, 3):
            if int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3):
                raise self._error("a big-endian GGUF; convert it to little-endian with gguf_convert_endian.py")
            raise self._error(f"GGUF version {self.version} is not supported (2 and 3 are); convert the model again")
        n_tensors, n_metadata = cursor.count(24, "tensor"), cursor.count(13, "metadata")
        self.metadata = Metadata(cursor, n_metadata)
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, not a power of two")
        entries = [self._read_tensor_info(cursor) for _ in range(n_tensors)]
        data_start = -(-cursor.at // alignment) * alignment
        self.tensors = {}
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
            self.tensors[name] = Tensor(name, shape, ggml_type, data_start + offset, nbytes, self)

    def _open_others(self, part):
        """The other files of a split model (llama.cpp's gguf-split), whose metadata but for split.* is the first's."""
        count, number = (self.metadata.get(f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
        if count in (0, 1) and not part:
            return
        if number != part or not isinstance(count, int):
            first = f"; name the first, {self._of_split(0, count)}" if isinstance(count, int) and not part else ""
            raise self._error(f"this is file {number!r} (from 0) of a split model{first}, where {part} is wanted")
        if part:
            return
        for i in range(1, min(count, _MOST_FILES)):
            other = GGUFFile(self._of_split(i, count), i)
            self._others.append(other)
            for name, tensor in other.tensors.items():
                if name in self.tensors:
                    raise other._error(f"tensor {name} is in another file of this split model too")
                self.tensors[name] = tensor
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise self._error(
                f"the {count} files of this split model have {len(self.tensors)} tensors, not {expected!r}"
            )

    def _of_split(self, i, count):
        """The name of file i (from 0) of a split model."""
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", self.path, re.DOTALL)
        if not match or int(match[2]) != count:
            raise self._error(f"one of {count} files of a split model must be named …-00001-of-{count:05}.gguf")
        return f"{match[1]}-{i + 1:05}-of-{count:05}.gguf"

    def _read_tensor_info(self, cursor):
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
        block_elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if ne[0] % block_elements:
            raise self._error(
                f"tensor {name}: rows of {ne[0]} are no multiple of {ggml_type.name}'s block of {block_elements}"
            )
        nbytes = ne[0] // block_elements * block_bytes
        for n in ne[1:]:
            nbytes *= n
        return name, tuple(reversed(ne)), ggml_type, offset, nbytes


class Metadata(Mapping):
    """The key-value section. Scalars and strings come as Python values; arrays are decoded when first asked for."""

    def __init__(self, cursor, n_entries):
        self._cursor = cursor
        self._entries = {}
        for _ in range(n_entries):
            key = cursor.string(_MAX_KEY, "metadata key")
            if key in self._entries:
                raise cursor.error(f"metadata key {key} stands twice")
            self._entries[key] = self._read_value(key, cursor.u32())

    def __getitem__(self, key):
        value = self._entries[key]
        if isinstance(value, _LazyArray):
            value = self._entries[key] = value.decode(self._cursor.buffer)
        return value

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def array_length(self, key):
        """Number of elements of the array under key, without decoding it; None where there is no such array."""
        value = self._entries.get(key)
        return (
            value.count
            if isinstance(value, _LazyArray)
            else len(value)
            if isinstance(value, (list, np.ndarray))
            else None
        )

    def _read_value(self, key, type_id):
        cursor = self._cursor
        if type_id in _SCALARS:
            _, code, size = _SCALARS[type_id]
            return struct.unpack("<" + code, cursor.take(size))[0]
        if type_id == _STRING:
            return cursor.string(None, f"metadata {key}")
        if type_id != _ARRAY:
            raise cursor.error(f"metadata {key} has the unknown type {type_id}")
        element = cursor.u32()
        if element in _SCALARS:
            count = cursor.count(_SCALARS[element][2], f"metadata {key}")
            at = cursor.at
            cursor.take_span(count * _SCALARS[element][2])
        elif element == _STRING:
            count = cursor.count(8, f"metadata {key}")
            at = cursor.at
            cursor.skip_strings(count, key)
        else:
            raise cursor.error(f"metadata {key} is an array of type {element}, which is not supported")
        return _LazyArray(element, count, at)


@dataclass(frozen=True)
class _LazyArray:
    element: int
    count: int
    at: int

    def decode(self, buffer):
        """list[str], or a NumPy array of the element type."""
        if self.element != _STRING:
            return np.frombuffer(buffer, _SCALARS[self.element][0], self.count, self.at).copy()
        out, at = [], self.at
        for _ in range(self.count):
            length = int.from_bytes(buffer[at : at + 8], "little")
            out.append(buffer[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return out


class _Cursor:
    """Reads the mapped header front to back; nothing past the file's end can be asked for."""

    def __init__(self, buffer, error):
        self.buffer, self.error, self.at = buffer, error, 0

    def take_span(self, size):
        at = self.at
        if size > len(self.buffer) - at:
            raise self.error(f"truncated: {size} bytes wanted at byte {at} of {len(self.buffer)}")
        self.at += size
        return at

    def take(self, size):
        at = self.take_span(size)
        return self.buffer[at : at + size]

    def u32(self):
        return int.from_bytes(self.take(4), "little")

    def u64(self):
        return int.from_bytes(self.take(8), "little")

    def count(self, least_bytes, what):
        """A u64 that counts things of at least that many bytes each, all still to come."""
        count = self.u64()
        if count * least_bytes > len(self.buffer) - self.at:
            raise self.error(f"{what} count {count} is more than the file can hold")
        return count

    def string(self, longest, what):
        length = self.u64()
        if longest is not None and length > longest:
            raise self.error(f"{what} of {length} bytes at byte {self.at}; at most {longest} are possible")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {self.at - length} is not valid UTF-8") from None

    def skip_strings(self, count, key):
        """Step over `count` strings.

        A vocabulary has hundreds of thousands, nearly all shorter than 256 bytes, so the loop believes the lengths' low
        bytes alone and NumPy checks the other seven of all of them at once; a longer string sends it round again.
        """
        buffer, end, at = self.buffer, len(self.buffer) - 8, self.at
        bytes_ = np.frombuffer(buffer, np.uint8)
        done, stride = 0, 1 << 16
        while done < count:
            starts = []
            append = starts.append
            for _ in range(min(count - done, stride)):
                if at > end:
                    break
                append(at)
                at += 8 + buffer[at]
            if not starts:
                raise self.error(f"truncated: metadata {key} has {count} strings, but the file ends after {done}")
            high = bytes_[np.asarray(starts)[:, None] + np.arange(1, 8)].any(axis=1)
            if high.any():  # redo the first long string with its whole length
                first = int(high.argmax())
                at = starts[first]
                at += 8 + int.from_bytes(buffer[at : at + 8], "little")
                done += first + 1
                stride = 16  # where long strings stand together, little is guessed ahead
            else:
                done += len(starts)
                stride = min(2 * stride, 1 << 16)
        if at > len(buffer):
            raise self.error(f"truncated: the strings of metadata {key} run past the file's end")
        self.at = at
