"""Files of records, cut into blocks: what one worker scores at a time, and what one file of results holds.

Where a file is cut follows from its content and the blocks' size alone, so that a later run finds the same blocks. A
block's checksum is part of its results' name: results of what the file has become since are never taken for its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
import glob
import os
from pathlib import Path
from typing import Any, BinaryIO
import zlib

from ..errors import InputError, KqprefillError

LINES = ".jsonl", ".ndjson"
TABLES = (".parquet",)
LONGEST_LINE = 256 << 20  # bytes; some files have no end of a line
_LONGEST_STEM = 120  # bytes of a file's name in its results' names
_FOOTER = 8  # the last bytes of a Parquet file: its metadata's size, and a magic number
_NONE: Mapping[int, Block] = {}


@dataclass(frozen=True)
class Block:
    """A run of records of one file.

    file: the file's place among the inputs; number: the block's place in it; both from 0. first, count: its first line
    or row, from 0, and how many. begin, end: where its bytes lie, of a file of lines. nbytes: its share of the file.
    checksum: CRC-32 of its bytes; of a table, of the file's metadata (whose statistics and sizes follow the content).
    """

    path: str
    file: int
    number: int
    first: int
    count: int
    begin: int
    end: int
    nbytes: int
    checksum: int

    @property
    def is_table(self) -> bool:
        """Whether its file is Parquet."""
        return is_table(self.path)

    @property
    def place(self) -> str:
        """What its results' names begin with: which block of which file it is."""
        stem = os.fsencode(Path(self.path).stem)[:_LONGEST_STEM].decode("utf-8", "ignore")
        return f"{self.file:05d}-{stem}-{self.number:06d}"

    def name(self, ending: str) -> str:
        """Its results' name."""
        return f"{self.place}-{self.checksum:08x}{ending}"

    @property
    def where(self) -> str:
        """What it is, for people."""
        unit = "rows" if self.is_table else "lines"
        return f"{self.path}: {unit} {self.first + 1} to {self.first + self.count}"


def is_table(path: str) -> bool:
    """Whether a file is Parquet, by its ending."""
    return path.lower().endswith(TABLES)


def parquet() -> Any:
    """The module pyarrow.parquet. Raises InputError where it is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install 'kqprefill[parquet]'") from None
    return pyarrow.parquet


def files_of(paths: Sequence[str]) -> list[str]:
    """The files that paths mean: themselves, what a glob (`*`, `?`, `[…]`, `**`) finds, and the files of lines and
    tables in folders and the folders in these, by name; none that is hidden.

    Raises KqprefillError for a path that leads to none, or to what cannot be read; InputError where a file is meant
    twice, or pyarrow is wanted and missing.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            own = sorted(_files_below(path))
            if not own:
                raise KqprefillError(f"{path}: this folder has no files of {_or(LINES + TABLES)}")
        elif not os.path.lexists(path) and glob.has_magic(path):
            own = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
            if not own:
                raise KqprefillError(f"{path}: no file has such a name")
        else:
            own = [path]
        found += own
    seen: set[str] = set()
    for path in found:
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(f"{path}: this file is given twice; its records would be scored twice")
        seen.add(real)
        _check(path)
    return found


def _files_below(folder: str) -> Iterator[str]:
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in files:
            if name.lower().endswith(LINES + TABLES) and not name.startswith((".", "_")):
                yield os.path.join(where, name)


def _check(path: str) -> None:
    try:
        if not os.path.isfile(path):
            os.stat(path)
            raise KqprefillError(f"{path}: a pipe or a device, where a file is wanted that can be cut into blocks")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise KqprefillError(f"{path}: {error.strerror}") from None
    if is_table(path):
        parquet()


def blocks_of(path: str, file: int, size: int, known: Mapping[int, Block] = _NONE) -> Iterator[Block]:
    """The blocks of a file, of about `size` bytes each. Raises KqprefillError where it cannot be read.

    known: by their numbers, blocks that were cut from what the file still is: they are not read again.
    """
    try:
        yield from _rows(path, file, size) if is_table(path) else _lines(path, file, size, known)
    except OSError as error:
        raise KqprefillError(f"{path}: {error.strerror or error}") from None


def _lines(path: str, file: int, size: int, known: Mapping[int, Block]) -> Iterator[Block]:
    """Whole lines: the first `size` bytes, and the rest of the line that they end in."""
    first = begin = number = 0
    with open(path, "rb") as lines:
        while True:
            block = known.get(number)
            if block is None or (block.path, block.file, block.first, block.begin) != (path, file, first, begin):
                lines.seek(begin)
                data = lines.read(size)
                if not data:
                    return
                if not data.endswith(b"\n"):
                    data += _rest_of_line(lines, path, first + data.count(b"\n"))
                count = data.count(b"\n") + (not data.endswith(b"\n"))
                end = begin + len(data)
                block = Block(path, file, number, first, count, begin, end, len(data), zlib.crc32(data))
            yield block
            first, begin, number = first + block.count, block.end, number + 1


def _rest_of_line(lines: BinaryIO, path: str, line: int) -> bytes:
    rest = lines.readline(LONGEST_LINE + 1)
    if len(rest) > LONGEST_LINE:
        raise KqprefillError(f"{path}: line {line + 1} is longer than {LONGEST_LINE >> 20} MiB")
    return rest


def _rows(path: str, file: int, size: int) -> Iterator[Block]:
    """Row groups together until they have `size` bytes; one that has more is cut into equal parts."""
    metadata, checksum = open_table(path).metadata, table_checksum(path)
    first = number = count = nbytes = 0
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        count, nbytes = count + group.num_rows, nbytes + group.total_byte_size
        if count == 0 or (nbytes < size and at + 1 < metadata.num_row_groups):
            continue
        parts = min(count, max(1, round(nbytes / size)))
        for part in range(parts):
            begin, end = part * count // parts, (part + 1) * count // parts
            yield Block(path, file, number, first + begin, end - begin, 0, 0, nbytes // parts, checksum)
            number += 1
        first, count, nbytes = first + count, 0, 0


def open_table(path: str) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises KqprefillError where the file is none, or cannot be read."""
    import pyarrow

    try:
        return parquet().ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise KqprefillError(f"{path}: no Parquet file that can be read: {' '.join(str(error).split())}") from None


def table_checksum(path: str) -> int:
    """The CRC-32 of a Parquet file's metadata, which stands at its end."""
    with open(path, "rb") as file:
        file.seek(-_FOOTER, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little") + _FOOTER
        file.seek(-length, os.SEEK_END)
        return zlib.crc32(file.read(length))


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
