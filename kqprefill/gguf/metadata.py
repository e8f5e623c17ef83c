"""A GGUF's metadata, read from the mapped file without believing any count or length in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
import mmap
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import GGUFError

_MAX_KEY = 65535


class _Scalar(NamedTuple):
    """A type of metadata values of fixed size: NumPy's name of it, the struct module's, its bytes."""

    dtype: str
    code: str
    nbytes: int


# The values of gguf_type (GGUF's GGUFValueType).
_SCALARS = {
    0: _Scalar("uint8", "B", 1),
    1: _Scalar("int8", "b", 1),
    2: _Scalar("uint16", "H", 2),
    3: _Scalar("int16", "h", 2),
    4: _Scalar("uint32", "I", 4),
    5: _Scalar("int32", "i", 4),
    6: _Scalar("float32", "f", 4),
    7: _Scalar("bool", "?", 1),
    10: _Scalar("uint64", "Q", 8),
    11: _Scalar("int64", "q", 8),
    12: _Scalar("float64", "d", 8),
}
_STRING, _ARRAY = 8, 9


class Metadata(Mapping[str, Any]):
    """The key-value section. Scalars and strings come as Python values.

    Arrays come as list[str] or as a NumPy array; they are decoded when they are first asked for.
    """

    def __init__(self, cursor: Cursor, n_entries: int) -> None:
        """cursor: where so many entries begin; it is moved behind them. Raises GGUFError."""
        self._cursor = cursor
        self._entries: dict[str, Any] = {}
        for _ in range(n_entries):
            key = cursor.string(_MAX_KEY, "metadata key")
            if key in self._entries:
                raise cursor.error(f"metadata key {key} stands twice")
            self._entries[key] = self._read_value(key, cursor.u32())

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if isinstance(value, _LazyArray):
            value = self._entries[key] = value.decode(self._cursor.buffer)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def array_length(self, key: str) -> int | None:
        """Number of elements of the array under key, without decoding it; None where there is no such array."""
        value = self._entries.get(key)
        if isinstance(value, _LazyArray):
            return value.count
        return len(value) if isinstance(value, (list, np.ndarray)) else None

    def _read_value(self, key: str, type_id: int) -> Any:
        cursor = self._cursor
        if type_id in _SCALARS:
            scalar = _SCALARS[type_id]
            return struct.unpack("<" + scalar.code, cursor.take(scalar.nbytes))[0]
        if type_id == _STRING:
            return cursor.string(None, f"metadata {key}")
        if type_id != _ARRAY:
            raise cursor.error(f"metadata {key} has the unknown type {type_id}")
        element = cursor.u32()
        if element in _SCALARS:
            count = cursor.count(_SCALARS[element].nbytes, f"metadata {key}")
            at = cursor.at
            cursor.take_span(count * _SCALARS[element].nbytes)
        elif element == _STRING:
            count = cursor.count(8, f"metadata {key}")
            at = cursor.at
            cursor.skip_strings(count, key)
        else:
            raise cursor.error(f"metadata {key} is an array of type {element}, which is not supported")
        return _LazyArray(element, count, at)


@dataclass(frozen=True)
class _LazyArray:
    """An array that nobody has asked for yet: `count` values of the type `element`, from byte `at` of the file on."""

    element: int
    count: int
    at: int

    def decode(self, buffer: mmap.mmap) -> list[str] | NDArray[Any]:
        """list[str], or a NumPy array of the element type."""
        if self.element != _STRING:
            numbers: NDArray[Any] = np.frombuffer(buffer, _SCALARS[self.element].dtype, self.count, self.at).copy()
            return numbers
        strings, at = [], self.at
        for _ in range(self.count):
            length = int.from_bytes(buffer[at : at + 8], "little")
            strings.append(buffer[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return strings


class Cursor:
    """Reads the mapped header front to back; nothing past the file's end can be asked for.

    buffer: the file. at: the byte that is read next. error(what): makes the exception for a file with that fault, which
    every method raises.
    """

    def __init__(self, buffer: mmap.mmap, error: Callable[[str], GGUFError]) -> None:
        self.buffer, self.error, self.at = buffer, error, 0

    def take_span(self, size: int) -> int:
        """Step over so many bytes; returns where they begin."""
        at = self.at
        if size > len(self.buffer) - at:
            raise self.error(f"truncated: {size} bytes wanted at byte {at} of {len(self.buffer)}")
        self.at += size
        return at

    def take(self, size: int) -> bytes:
        """The next bytes."""
        at = self.take_span(size)
        return self.buffer[at : at + size]

    def u32(self) -> int:
        """A uint32."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """A uint64."""
        return int.from_bytes(self.take(8), "little")

    def count(self, least_bytes: int, what: str) -> int:
        """A uint64 that counts things of at least that many bytes each, all still to come."""
        count = self.u64()
        if count * least_bytes > len(self.buffer) - self.at:
            raise self.error(f"{what} count {count} is more than the file can hold")
        return count

    def string(self, longest: int | None, what: str) -> str:
        """A uint64 length, of at most `longest` bytes, and as much UTF-8."""
        length = self.u64()
        if longest is not None and length > longest:
            raise self.error(f"{what} of {length} bytes at byte {self.at}; at most {longest} are possible")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {self.at - length} is not valid UTF-8") from None

    def skip_strings(self, count: int, key: str) -> None:
        """Step over `count` strings, the array under metadata `key`.

        A vocabulary has hundreds of thousands, nearly all shorter than 256 bytes. So the loop takes a length's lowest
        byte for all of it; then NumPy looks at the other seven bytes of all these lengths at once. Where they are not
        zero, the string is longer, and the loop begins again behind it.
        """
        buffer, end, at = self.buffer, len(self.buffer) - 8, self.at
        bytes_ = np.frombuffer(buffer, np.uint8)
        done, stride = 0, 1 << 16
        while done < count:
            starts: list[int] = []
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
                stride = 16  # long strings often stand together: guess few lengths ahead
            else:
                done += len(starts)
                stride = min(2 * stride, 1 << 16)
        if at > len(buffer):
            raise self.error(f"truncated: the strings of metadata {key} run past the file's end")
        self.at = at
