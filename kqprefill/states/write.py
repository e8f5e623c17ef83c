"""Write a state file, its pieces in any order and from several threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
import os
import tempfile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array
from ..errors import InputError, KqprefillError
from .elements import encode, rotate
from .in_memory import InMemoryFile, in_memory
from .layout import Layout, Rows, StateOptions, StateShape, layout


class StateWriter:
    """Of the first `cells` of a sequence's tokens, to a file that is open for writing and empty; to be closed, which
    leaves the file open.

    Raises InputError where the model's rows cannot be stored so, or the file cannot be written in places (a pipe);
    OSError.
    """

    def __init__(
        self, file: BinaryIO, shape: StateShape, options: StateOptions, tokens: Sequence[int], cells: int
    ) -> None:
        self._file, self._shape = file, shape
        self.layout: Layout = layout(shape, options, tokens, cells)
        if not file.seekable():
            raise InputError("a state is written layer by layer, in several places of its file: it cannot go to a pipe")
        self._in_memory: InMemoryFile | None = None
        for offset, data in self.layout.fixed:
            self._put(data, offset)
        if in_memory(file.fileno()):
            self._in_memory = InMemoryFile(file.fileno(), self.layout.nbytes, self._order())

    def _order(self) -> Iterator[tuple[int, int]]:
        """The parts of the file as layers come: keys and values of each are apart."""
        for _, place in sorted(self.layout.attention.items()):
            for rows in (place.keys, place.values):
                if rows is not None:
                    yield rows.offset, rows.offset + rows.nbytes

    def rows(self, layer: int, first: int, keys: NDArray[Any], values: NDArray[Any] | None) -> None:
        """A layer's rows of tokens from `first` on, of which those that have no cell are left out: real values, float32
        or float16 [n, ...]. Raises InputError for values that the element type cannot hold; OSError."""
        place = self.layout.attention.get(layer)
        if place is None:
            return
        cut = max(0, place.first - first)
        end = min(len(keys), place.first + place.keys.cells - first)
        for rows, where in ((keys, place.keys), (values, place.values)):
            if rows is not None and where is not None and cut < end:
                self._put_rows(rows[cut:end].reshape(end - cut, -1), where, first + cut - place.first, layer)

    def recurrence(self, layer: int, matrices: Float32Array, rows: Float32Array) -> None:
        """A recurrence's matrices [heads, key_dim, value_dim], and the last rows [taps, channels] of its convolution's
        inputs. llama.cpp has each matrix transposed, and the rows channel by channel."""
        at_rows, at_matrices = self.layout.recurrent[layer]
        self._put(np.ascontiguousarray(rows.T, "<f4").tobytes(), at_rows)
        self._put(np.ascontiguousarray(matrices.transpose(0, 2, 1), "<f4").tobytes(), at_matrices)

    def _put_rows(self, rows: NDArray[Any], where: Rows, cell: int, layer: int) -> None:
        if where.rotation:
            rows = rotate(np.asarray(rows, np.float32), where.rotation)
        try:
            raw = encode(rows, where.element)
        except InputError as error:
            raise InputError(f"layer {layer}: {error}") from None
        if not where.transposed:
            self._put(raw, where.offset + cell * where.element.row_bytes(where.width))
            return
        size = where.element.nbytes
        columns = np.ascontiguousarray(raw.reshape(len(raw), -1, size).transpose(1, 0, 2)).reshape(where.width, -1)
        for number, column in enumerate(columns):
            self._put(column, where.offset + (number * where.cells + cell) * size)

    def _put(self, data: bytes | NDArray[np.uint8], offset: int) -> None:
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        if self._in_memory is not None:
            self._in_memory.put(view, offset)
            return
        while view:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def close(self) -> None:
        """To be called once nothing is being written."""
        if self._in_memory is not None:
            self._in_memory.close()


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which is given its name at the end and removed where the work fails.

    Raises KqprefillError where it cannot be written.
    """
    target = os.path.realpath(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".kqprefill-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise KqprefillError(f"{os.fspath(path)}: cannot be written: {error.strerror or error}") from None
