"""Read a state file: llama.cpp's, or ours. It is not believed: whatever it says is held against its size and the
model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
import mmap
import os
import struct
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array
from ..errors import StateError
from .elements import ELEMENTS, Element, all_finite, decode, rotate
from .layout import FORMATS, AttentionLayer, Format, Rows, StateShape, rotations

_PACKED = -1  # what llama-server's token lists begin with: -1, a version, the count, the tokens, the count of media


@dataclass(frozen=True)
class _Cached:
    """A layer's rows, and which cell each token from the first on is in, -1 where it is in none."""

    cells: NDArray[np.int32]
    keys: Rows
    values: Rows | None


class StateFile:
    """A state file of a model of that shape; a context manager.

    tokens: the ids that it lists. cells: how many of them, from the first on, the state is of. Raises StateError, a
    line that begins with the path: no state file, one cut short, of a version that is not known, of another model's
    shape, or not of a sequence from its first token on; OSError where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], shape: StateShape) -> None:
        self.path, self._shape, self._at = os.fspath(path), shape, 0
        self._attention: dict[int, _Cached] = {}
        self._recurrent: dict[int, tuple[int, int]] = {}
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise self._error("the file is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def keys_values(
        self, layer: int, begin: int = 0, end: int | None = None
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """A layer's keys, and values, of tokens begin to end - 1 (of all `cells`, unless given), real values [n, width]
        each: float16 where the file has those and does not rotate them, perhaps in the file itself, else float32. Zeros
        of tokens that lie before its window and are not there. Raises StateError for values that are not finite."""
        held = self._attention[layer]
        cells = held.cells[begin:end]
        keys = self._rows(held.keys, cells)
        return keys, None if held.values is None else self._rows(held.values, cells)

    def recurrence(self, layer: int) -> tuple[Float32Array, Float32Array]:
        """A recurrence's matrices [heads, key_dim, value_dim], and rows [taps, channels] (StateWriter.recurrence)."""
        state = dict(self._shape.recurrent)[layer]
        at_rows, at_matrices = self._recurrent[layer]
        rows = self._floats(at_rows, (state.channels, state.taps))
        matrices = self._floats(at_matrices, (state.heads, state.value_dim, state.key_dim))
        return np.ascontiguousarray(matrices.transpose(0, 2, 1)), np.ascontiguousarray(rows.T)

    def close(self) -> None:
        """Unmap the file."""
        with suppress(BufferError):  # an error's traceback may still hold arrays of it; it goes when they do
            self._map.close()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _floats(self, offset: int, shape: tuple[int, ...]) -> Float32Array:
        count = int(np.prod(shape))
        values = np.frombuffer(self._map, "<f4", count, offset).reshape(shape).astype(np.float32)
        if not all_finite(values):
            raise self._not_finite()
        return values

    def _rows(self, rows: Rows, cells: NDArray[np.int32]) -> NDArray[Any]:
        """The rows of tokens that are in these cells."""
        there = cells >= 0
        held = cells[there]
        run = held.size > 0 and (np.diff(held) == 1).all()  # of which there need be no copy
        picked = slice(int(held[0]), int(held[-1]) + 1) if run else held
        raw = np.frombuffer(self._map, np.uint8, rows.nbytes, rows.offset)
        if rows.transposed:
            raw = raw.reshape(rows.width, rows.cells, -1)[:, picked].transpose(1, 0, 2)
        else:
            raw = raw.reshape(rows.cells, -1)[picked]
        values = rotate(decode(raw.reshape(held.size, rows.element.row_bytes(rows.width)), rows.element), rows.rotation)
        if not all_finite(values):
            raise self._not_finite()
        if there.all():
            return values
        out = np.zeros((cells.size, rows.width), values.dtype)
        out[there] = values
        return out

    def _not_finite(self) -> StateError:
        return self._error("the state holds values that are not finite: the file is damaged")

    # What is in the file, from its beginning to its end --------------------------------------------------------------

    def _parse(self) -> None:
        magic, version, count = self._unpack("<III")
        known = {(f.magic, f.version): f for f in FORMATS.values()}
        if magic not in {f.magic for f in FORMATS.values()}:
            raise self._error("this is no state file of llama.cpp (its first bytes are not ggsq or ggsn)")
        if (magic, version) not in known:
            kind = "ggsq" if any(f.magic == magic and not f.session for f in known.values()) else "ggsn"
            raise self._error(f"version {version} of {kind} is not known; those that are: {', '.join(FORMATS)}")
        self.format: Format = known[magic, version]
        self.tokens: list[int] = self._tokens(count)
        if self.format.session:
            [length] = self._unpack("<I")
            name = self._map[self._take(length) : self._at].decode("utf-8", "replace")
            if name != self._shape.architecture:
                raise self._error(f"the state is of architecture {name}, the model of {self._shape.architecture}")
        ends = [self._cache(number, layers) for number, layers in enumerate(self._shape.caches)]
        if self._shape.recurrent:
            ends.append(self._recurrences())
        self.cells: int = ends[0]
        if len(set(ends)) > 1:
            raise self._error(f"its parts are of different numbers of tokens: {', '.join(map(str, ends))}")
        if self.cells > len(self.tokens):
            raise self._error(f"it has the states of {self.cells} tokens, but lists {len(self.tokens)}")
        if not self.cells:
            raise self._error("it has the state of no token")
        if self.format.session and self._at != len(self._map):
            raise self._error("the file goes on behind the state: it is of a model of another shape, or damaged")

    def _tokens(self, count: int) -> list[int]:
        listed: list[int] = np.frombuffer(self._map, "<i4", count, self._take(4 * count)).tolist()
        if listed[:1] != [_PACKED]:
            return listed
        if len(listed) < 4 or listed[1] != 1 or listed[2] != len(listed) - 4 or listed[-1] != 0:
            raise self._error("its list of tokens is of an unknown form, or has images or sound among them")
        return listed[3:-1]

    def _cache(self, number: int, layers: Sequence[AttentionLayer]) -> int:
        """One cache; returns how many tokens the sequence has by it."""
        [streams] = self._unpack("<I")
        end = 0
        for _ in range(streams):
            [cells] = self._unpack("<I")
            if not cells:
                continue
            if end:
                raise self._error("it has several sequences; save one (llama_state_seq_save_file)")
            positions = self._cells(cells)
            end = int(positions.max()) + 1
            first = max(0, end - self._shape.window + 1) if number else 0
            places = np.full(end, -1, np.int32)
            places[positions] = np.arange(cells, dtype=np.int32)
            if (places >= 0).sum() != cells or (places[first:] < 0).any():
                raise self._error("its cells are not those of a sequence from its first token on")
            self._layers(layers, cells, places)
        return end

    def _cells(self, cells: int) -> NDArray[np.int32]:
        extra = self.format.extra_bytes // 4 * self._shape.axes
        width = 3 + extra
        table = np.frombuffer(self._map, "<i4", cells * width, self._take(4 * cells * width)).reshape(cells, width)
        if (table[:, 1] != 1).any():
            raise self._error("its cells do not belong to one sequence each, or are of a model of another kind")
        positions: NDArray[np.int32] = table[:, 0].astype(np.int32)
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= len(self.tokens):
            raise self._error(f"its cells have positions {low} to {high}, but {len(self.tokens)} tokens are listed")
        return positions

    def _layers(self, layers: Sequence[AttentionLayer], cells: int, places: NDArray[np.int32]) -> None:
        transposed, count = self._unpack("<II")
        if transposed > 1 or count != len(layers):
            raise self._error(f"a cache of {count} layers, where the model has {len(layers)}")
        given = self._unpack("<II") if self.format.has_rotations else None
        keys = [self._keys(layer, cells) for layer in layers]
        values = [self._values(layer, cells, bool(transposed)) for layer in layers]
        for layer, (key, key_at), value in zip(layers, keys, values):
            turns = given or rotations(layers, key, value[0] if value else key)
            for turn, dim in zip(turns, (layer.key_dim, layer.value_dim)):
                if turn and (turn & (turn - 1) or dim % turn):
                    raise self._error(f"a rotation of {turn} values, where heads have {dim}")
            rows = Rows(key_at, key, layer.key_width, cells, turns[0])
            held = None
            if value is not None:
                held = Rows(value[1], value[0], layer.value_width, cells, turns[1], bool(transposed))
            self._attention[layer.layer] = _Cached(places, rows, held)

    def _keys(self, layer: AttentionLayer, cells: int) -> tuple[Element, int]:
        number, row_bytes = self._unpack("<iQ")
        element = self._element(number)
        self._hold(layer.layer, "keys", row_bytes, element, layer.key_width)
        return element, self._take(cells * row_bytes)

    def _values(self, layer: AttentionLayer, cells: int, transposed: bool) -> tuple[Element, int] | None:
        if not layer.value_width:
            return None
        if transposed:
            number, size, width = self._unpack("<iII")
            row_bytes = size * width
        else:
            number, row_bytes = self._unpack("<iQ")
        element = self._element(number)
        if transposed and element.quantised:
            raise self._error(f"its values are transposed, which {element.name} cannot be")
        self._hold(layer.layer, "values", row_bytes, element, layer.value_width)
        return element, self._take(cells * row_bytes)

    def _hold(self, layer: int, what: str, row_bytes: int, element: Element, width: int) -> None:
        wanted = element.row_bytes(width)
        if row_bytes != wanted or width % element.block:
            raise self._error(
                f"layer {layer}: {what} of {row_bytes} bytes a token, where the model has {wanted}: another model's"
            )

    def _element(self, number: int) -> Element:
        for element in ELEMENTS.values():
            if element.number == number:
                return element
        raise self._error(f"its numbers are of ggml's type {number}; {', '.join(ELEMENTS)} can be read")

    def _recurrences(self) -> int:
        """The recurrences' states; returns how many tokens the sequence has by them."""
        cells, position, ids = self._unpack("<IiI")
        if cells != 1 or ids > 1:
            raise self._error(f"it has the recurrent states of {cells} sequences, where one is wanted")
        self._take(4 * ids)
        transposed, layers = self._unpack("<II")
        if transposed or layers != self._shape.layers:
            raise self._error(f"recurrent states of {layers} layers, where the model has {self._shape.layers}")
        at = {layer: self._state(layer, state.taps * state.channels) for layer, state in self._shape.recurrent}
        for layer, state in self._shape.recurrent:
            self._recurrent[layer] = at[layer], self._state(layer, state.matrix_values)
        return position + 1

    def _state(self, layer: int, count: int) -> int:
        number, nbytes = self._unpack("<iQ")
        self._hold(layer, "a recurrent state", nbytes, self._element(number), count)
        if number != ELEMENTS["f32"].number:
            raise self._error(f"layer {layer}: recurrent states are f32")
        return self._take(nbytes)

    def _unpack(self, form: str) -> tuple[int, ...]:
        offset = self._take(struct.calcsize(form))
        return struct.unpack_from(form, self._map, offset)

    def _take(self, nbytes: int) -> int:
        """Where the next bytes are."""
        if nbytes > len(self._map) - self._at:
            raise self._error(
                f"it ends at byte {len(self._map)}, where {nbytes} more are wanted from byte {self._at} on: it is cut "
                "short, or of a model of another shape"
            )
        self._at += nbytes
        return self._at - nbytes

    def _error(self, what: str) -> StateError:
        return StateError(f"{self.path}: {what}")
