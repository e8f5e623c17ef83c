"""Importance matrices, and the two kinds of files that llama.cpp keeps them in (common/imatrix-loader.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
import math
import os
import struct
from typing import BinaryIO

import numpy as np

from ..collector import Float64Array, Squares
from ..errors import GGUFError, InputError, KqprefillError
from ..gguf import GGUFFile
from ..gguf.types import GGML

FORMATS = "gguf", "dat"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT = 32
_UINT32, _STRING, _ARRAY = 4, 8, 9  # GGUFValueType
_LONGEST_NAME = 63


@dataclass(frozen=True)
class ImportanceMatrix:
    """Squares by tensor, as llama-imatrix sums them.

    chunk_size: tokens of a chunk. datasets: the names of the texts that were read.
    """

    entries: Mapping[str, Squares]
    chunk_size: int
    datasets: tuple[str, ...] = ()

    @property
    def chunks(self) -> int:
        """How many chunks were read: the most rows that a tensor has seen, in chunks."""
        return max((int(e.counts.max()) for e in self.entries.values()), default=0) // self.chunk_size

    def __add__(self, other: ImportanceMatrix) -> ImportanceMatrix:
        """Both together. Raises InputError where a tensor has other sizes in the one than in the other."""
        entries = dict(self.entries)
        for name, squares in other.entries.items():
            entries[name] = _joined(name, entries[name], squares) if name in entries else squares
        return ImportanceMatrix(entries, self.chunk_size, (*self.datasets, *other.datasets))


def _joined(name: str, a: Squares, b: Squares) -> Squares:
    """The sum of two entries, of which one may have a single count for all matrices of a stack (.dat files have)."""
    if len(a.sums) != len(b.sums):
        raise InputError(f"tensor {name} has {len(a.sums)} sums in one and {len(b.sums)} in another importance matrix")
    count = max(len(a.counts), len(b.counts))
    if {len(a.counts), len(b.counts)} - {1, count}:
        raise InputError(f"tensor {name} has {len(a.counts)} counts in one and {len(b.counts)} in another matrix")
    both = (np.broadcast_to(squares.counts, count) for squares in (a, b))
    return Squares(a.sums + b.sums, sum(both, np.zeros(count, np.int64)))


@np.errstate(invalid="ignore")  # a NaN in a damaged file is told in a line, not by a warning of NumPy's as well
def read_matrix(path: str | os.PathLike[str], chunk_size: int) -> ImportanceMatrix:
    """The ImportanceMatrix in a file of either kind.

    chunk_size: tokens of a chunk of the matrix that it will be added to, which a .dat's sums are multiplied by, as
    llama-imatrix does: the file says how many chunks there were, and not of how many tokens. Raises KqprefillError for
    a file that cannot be read or is no importance matrix; GGUFError for one that is damaged.
    """
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            if not is_gguf:
                file.seek(0)
                return _read_dat(_Reader(file, os.fspath(path)), chunk_size)
    except OSError as error:
        raise KqprefillError(f"{os.fspath(path)}: {error.strerror or error}") from None
    return _read_gguf(os.fspath(path), chunk_size)


def _read_gguf(path: str, chunk_size: int) -> ImportanceMatrix:
    with GGUFFile(path) as file:
        names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
        if not names:
            raise KqprefillError(f"{path}: no importance matrix: it has no tensor whose name ends in {_SUMS}")
        entries = {}
        for name in names:
            parts = [file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
            if any(part is None or part.type != GGML.F32 for part in parts):
                raise GGUFError(f"{path}: {name}{_SUMS} and {name}{_COUNTS} must both be there, of type F32")
            sums, counts = (part.data.view(np.float32).ravel().astype(np.float64) for part in parts if part is not None)
            entries[name] = _checked(path, name, sums, counts)
        datasets = file.metadata.get("imatrix.datasets")
        return ImportanceMatrix(entries, chunk_size, tuple(map(str, datasets if isinstance(datasets, list) else ())))


def _checked(path: str, name: str, sums: Float64Array, counts: Float64Array) -> Squares:
    sound = np.isfinite(sums).all() and (sums >= 0).all() and ((counts >= 0) & (counts < 2.0**62)).all()
    if not sound or not len(counts) or not len(sums) or len(sums) % len(counts):
        raise GGUFError(f"{path}: the sums of {name} are not sums of squares; the file is damaged")
    return Squares(sums, np.rint(counts).astype(np.int64))


@dataclass
class _Reader:
    """Reads a .dat, and says what is wrong with one."""

    file: BinaryIO
    path: str
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = os.fstat(self.file.fileno()).st_size

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        if not 0 <= nbytes <= self.left:
            raise KqprefillError(
                f"{self.path}: no importance matrix, or one that was cut short (neither GGUF nor .dat)"
            )
        self.left -= nbytes
        return self.file.read(nbytes)

    def int32(self) -> int:
        """The next int32."""
        (value,) = struct.unpack("<i", self.take(4))
        return int(value)


def _read_dat(reader: _Reader, chunk_size: int) -> ImportanceMatrix:
    entries = {}
    count = reader.int32()
    if count < 1:
        raise KqprefillError(f"{reader.path}: no importance matrix: it has {count} entries")
    for _ in range(count):
        length = reader.int32()
        name = reader.take(length if length <= _LONGEST_NAME else -1).decode("utf-8", "replace")
        calls, values = reader.int32(), reader.int32()
        sums = np.frombuffer(reader.take(4 * values), "<f4").astype(np.float64)
        entries[name] = _checked(reader.path, name, sums * chunk_size, np.array([float(calls) * chunk_size]))
    datasets: tuple[str, ...] = ()
    if reader.left:
        reader.int32()  # chunks
        if reader.left and (dataset := reader.take(reader.int32()).decode("utf-8", "replace")):
            datasets = (dataset,)
    return ImportanceMatrix(entries, chunk_size, datasets)


def write_matrix(matrix: ImportanceMatrix, kind: str, file: BinaryIO) -> None:
    """Write an ImportanceMatrix as a file of one of the FORMATS, byte for byte as llama-imatrix lays it out."""
    {"gguf": _write_gguf, "dat": _write_dat}[kind](matrix, file)


def _sorted(matrix: ImportanceMatrix) -> list[tuple[str, Squares]]:
    return sorted(matrix.entries.items(), key=lambda entry: entry[0].encode())


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _write_gguf(matrix: ImportanceMatrix, file: BinaryIO) -> None:
    tensors: list[tuple[str, list[int], bytes]] = []
    for name, squares in _sorted(matrix):
        count = len(squares.counts)
        stacked = [count] * (count > 1)
        sums = squares.sums.astype("<f4").tobytes()
        tensors.append((name + _SUMS, [len(squares.sums) // count, *stacked], sums))
        tensors.append((name + _COUNTS, [1, *stacked], squares.counts.astype("<f4").tobytes()))
    keys = [
        _text("general.type") + struct.pack("<I", _STRING) + _text("imatrix"),
        _text("imatrix.datasets")
        + struct.pack("<IIQ", _ARRAY, _STRING, len(matrix.datasets))
        + b"".join(map(_text, matrix.datasets)),
        _text("imatrix.chunk_count") + struct.pack("<II", _UINT32, matrix.chunks),
        _text("imatrix.chunk_size") + struct.pack("<II", _UINT32, matrix.chunk_size),
    ]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys]
    offset = 0
    for name, ne, data in tensors:
        head.append(_text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, GGML.F32, offset))
        offset += _padded(len(data))
    whole = b"".join(head)
    file.write(whole.ljust(_padded(len(whole)), b"\0"))
    for _, _, data in tensors:
        file.write(data.ljust(_padded(len(data)), b"\0"))


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _write_dat(matrix: ImportanceMatrix, file: BinaryIO) -> None:
    entries = [(name, squares) for name, squares in _sorted(matrix) if squares.counts.any()]
    file.write(struct.pack("<i", len(entries)))
    for name, squares in entries:
        calls = -(-int(squares.counts.max()) // matrix.chunk_size)
        sums = squares.sums.reshape(len(squares.counts), -1)
        counts = squares.counts[:, None].astype(np.float64)
        means = np.where(counts > 0, sums, 1.0) / np.maximum(counts, 1.0)  # 1 for an expert that no token went to
        data = name.encode()
        file.write(struct.pack("<i", len(data)) + data + struct.pack("<ii", calls, sums.size))
        file.write((means * calls).astype("<f4").tobytes())
    dataset = (matrix.datasets or ("",))[-1].encode("utf-8", "surrogateescape")
    file.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)


@dataclass(frozen=True)
class Statistics:
    """What llama-imatrix's --show-statistics says of a tensor, over the means a = sums / counts of its columns.

    total, smallest, largest, mean, deviation: of a. active: the share of a > 1e-5. entropy: in bits, of a / total.
    above: the share of a more than a deviation above the mean (ZD, arXiv 2406.17415). cosine: of the sums with those of
    the same tensor a layer before; None where there is none.
    """

    tensor: str
    columns: int
    total: float
    smallest: float
    largest: float
    mean: float
    deviation: float
    active: float
    entropy: float
    above: float
    cosine: float | None

    @property
    def normalised_entropy(self) -> float:
        """As a part of what as many equal columns would have."""
        return self.entropy / math.log2(self.columns) if self.columns > 1 else 0.0


def statistics(matrix: ImportanceMatrix) -> list[Statistics]:
    """The Statistics of each tensor that has data, by name."""
    return [_statistics(matrix, name, squares) for name, squares in _sorted(matrix) if squares.counts.any()]


def _statistics(matrix: ImportanceMatrix, name: str, squares: Squares) -> Statistics:
    reached = squares.counts > 0
    means = (squares.sums.reshape(len(squares.counts), -1)[reached] / squares.counts[reached, None]).ravel()
    total, deviation = float(means.sum()), float(means.std())
    shares = means[means > 0] / total if total > 0 else np.empty(0)
    return Statistics(
        name,
        len(means),
        total,
        float(means.min()),
        float(means.max()),
        float(means.mean()),
        deviation,
        float((means > 1e-5).mean()),
        float(-(shares * np.log2(shares)).sum()),
        float((means > means.mean() + deviation).mean()) if deviation > 0 else 0.0,
        _cosine(squares, matrix.entries.get(_layer_before(name))),
    )


def _layer_before(name: str) -> str:
    prefix, _, rest = name.partition(".")
    number, _, own = rest.partition(".")
    return f"blk.{int(number) - 1}.{own}" if prefix == "blk" and number.isdecimal() else ""


def _cosine(a: Squares, b: Squares | None) -> float | None:
    if b is None or len(a.sums) != len(b.sums):
        return None
    lengths = float(np.linalg.norm(a.sums) * np.linalg.norm(b.sums))
    return float(a.sums @ b.sums) / lengths if lengths > 0 else None


def means_by_layer(stats: Iterable[Statistics]) -> dict[int, tuple[float, float, float]]:
    """{layer: (total, above, cosine)}: means over a layer's tensors, each counting by its columns."""
    layers: dict[int, list[Statistics]] = {}
    for own in stats:
        prefix, number, *_ = *own.tensor.split("."), ""
        if prefix == "blk" and number.isdecimal():
            layers.setdefault(int(number), []).append(own)
    result = {}
    for layer, tensors in sorted(layers.items()):
        columns = sum(t.columns for t in tensors)
        values = ((t.total, t.above, t.cosine or 0.0) for t in tensors)
        total, above, cosine = (sum(v * t.columns for v, t in zip(each, tensors)) / columns for each in zip(*values))
        result[layer] = total, above, cosine
    return result
