"""State files byte by byte, without a model."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
import errno
import os
from pathlib import Path
import struct
import tempfile

from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
import numpy as np
import pytest

from kqprefill.core import Recurrent
from kqprefill.errors import InputError, KqprefillError, StateError
from kqprefill.states import FORMATS, TYPES, in_memory
from kqprefill.states.elements import ELEMENTS, decode, encode, key_rotation, rotate, value_rotation
from kqprefill.states.layout import AttentionLayer, StateOptions, StateShape
from kqprefill.states.read import StateFile
from kqprefill.states.write import StateWriter, whole_file

FULL = StateShape("tiny", 2, (AttentionLayer(0, 1, 64, 1, 64), AttentionLayer(1, 1, 64, 1, 64)))
SHAPES = {
    "full": FULL,
    "sliding": StateShape(
        "slides", 3, (AttentionLayer(1, 2, 64, 2, 64),), tuple(AttentionLayer(i, 1, 32, 1, 32) for i in (0, 2)), 5
    ),
    "latent": StateShape("latent", 1, (AttentionLayer(0, 1, 96, 0, 0),)),
    "hybrid": StateShape(
        "hybrid",
        3,
        (AttentionLayer(1, 2, 32, 2, 64),),
        recurrent=tuple((i, Recurrent(3, 4, 5, 22, 3)) for i in (0, 2)),
        axes=True,
    ),
}


def content(shape, rng, n):
    layers = [layer for cache in shape.caches for layer in cache]
    rows = {
        a.layer: [rng.normal(size=(n, width)).astype(np.float32) for width in (a.key_width, a.value_width)]
        for a in layers
    }
    states = {
        layer: (
            rng.normal(size=(s.heads, s.key_dim, s.value_dim)).astype(np.float32),
            rng.normal(size=(s.taps, s.channels)).astype(np.float32),
        )
        for layer, s in shape.recurrent
    }
    return rows, states


def fill(writer, n, rows, states, piece=4):
    for layer in reversed(rows):  # in any order
        for first in range(0, n, piece):
            keys, values = (a[first : first + piece] for a in rows[layer])
            writer.rows(layer, first, keys, values if values.size else None)
    for layer, (matrices, last) in states.items():
        writer.recurrence(layer, matrices, last)


def write(path, shape, options, tokens, cells, rows, states, piece=4):
    with open(path, "wb") as file, closing(StateWriter(file, shape, options, tokens, cells)) as writer:
        fill(writer, len(tokens), rows, states, piece)
    assert path.stat().st_size == writer.layout.nbytes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(name, format, rng, tmp_path):
    shape, n = SHAPES[name], 11
    session = format.startswith("ggsn")
    cells = n - session
    tokens = rng.integers(0, 1000, n).tolist()
    rows, states = content(shape, rng, n)
    for types in TYPES:
        for transposed in (False, True):
            for streams, kept in ((1, None), (3, 7)):
                if transposed and types == "q8_0":
                    continue
                options = StateOptions(format, types, types, transposed, kept, streams)
                write(tmp_path / "state", shape, options, tokens, cells, rows, states)
                with StateFile(tmp_path / "state", shape) as file:
                    assert file.tokens == tokens and file.cells == cells and file.format.name == format
                    first = cells - 7 if kept and shape.sliding else 0
                    slides = {layer.layer for layer in shape.sliding or ()}
                    for layer, held in rows.items():
                        for given, got in zip(held, file.keys_values(layer)):
                            begin = first if layer in slides else 0
                            if got is not None:
                                bound = {"f32": 0, "f16": 2e-3, "q8_0": 0.06}[types]
                                assert np.abs(got[begin:] - given[begin:cells]).max() <= bound
                                assert not got[:begin].any()
                    for layer, given in states.items():
                        assert all(np.array_equal(a, b) for a, b in zip(given, file.recurrence(layer)))


@pytest.mark.parametrize("format,extra", [("ggsq-4", [0, 0]), ("ggsq-3", []), ("ggsq-2", [])])
def test_a_sequence_byte_by_byte(format, extra, rng, tmp_path):
    rows, _ = content(FULL, rng, 2)
    write(tmp_path / "state", FULL, StateOptions(format), [7, 9], 2, rows, {})
    expected = b"qsgg" + struct.pack("<III2I", int(format[-1]), 2, 7, 9, 1) + struct.pack("<I", 2)
    expected += struct.pack("<6i", 0, 1, 0, 1, 1, 0)  # cells: position, how many sequences, which
    expected += struct.pack(f"<{2 + len(extra)}I", 0, 2, *extra)  # not transposed, layers, rotations
    for number in (0, 1):
        for layer in (0, 1):
            expected += struct.pack("<iQ", 1, 128) + rows[layer][number].astype("<f2").tobytes()
    assert (tmp_path / "state").read_bytes() == expected


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no tmpfs at /dev/shm")
def test_a_file_in_memory_has_the_same_bytes(rng, tmp_path, monkeypatch):
    """It is written through a mapping; where the file system is full, that is an error, not a signal."""
    shape = SHAPES["hybrid"]
    rows, states = content(shape, rng, 9)
    options = StateOptions("ggsn-11", values="f32", transposed=True)
    of = shape, options, list(range(9)), 8
    write(tmp_path / "state", *of, rows, states)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "state"
        monkeypatch.setattr(in_memory, "_PIECE", 4096)
        with whole_file(path) as file, closing(StateWriter(file, *of)) as writer:
            fill(writer, 9, rows, states)
        assert path.read_bytes() == (tmp_path / "state").read_bytes()
        write(path, *of, rows, states)  # open for writing only: not through a mapping
        assert path.read_bytes() == (tmp_path / "state").read_bytes()
        reserve, calls = os.posix_fallocate, []

        def full(handle, offset, nbytes):
            calls.append(offset)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            reserve(handle, offset, nbytes)

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(KqprefillError, match=r"full: cannot be written: No space left"):  # noqa: SIM117
            with whole_file(Path(folder) / "full") as file, closing(StateWriter(file, *of)) as writer:
                fill(writer, 9, rows, states)
        assert os.listdir(folder) == ["state"] and len(calls) > 1


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no tmpfs at /dev/shm")
def test_pieces_of_a_file_in_memory_keep_each_other(rng, monkeypatch):
    """By several threads, cut within pages, which are unmapped as they are written."""
    monkeypatch.setattr(in_memory, "_PIECE", 3 * 4096)
    data = rng.integers(0, 256, 200_001, np.uint8)
    cuts = np.sort(rng.choice(np.arange(1, data.size), 40, replace=False)).tolist()
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        with closing(in_memory.InMemoryFile(file.fileno(), data.size, [(100_000, 150_000)])) as mapped:
            parts = [(begin, memoryview(data[begin:end])) for begin, end in zip([0, *cuts], [*cuts, data.size])]
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(mapped.put, part, begin) for begin, part in reversed(parts)]:
                    done.result()
        assert file.read() == data.tobytes()


def test_tokens_of_a_piece(rng, tmp_path):
    """Cells in any order, and tokens before a window: a piece is the same part of all rows."""
    shape, n = SHAPES["sliding"], 40
    rows, _ = content(shape, rng, n)
    path = tmp_path / "state"
    for options in (StateOptions(cells=9), StateOptions(keys="q8_0", values="q8_0"), StateOptions(transposed=True)):
        write(path, shape, options, list(range(n)), n, rows, {})
        with StateFile(path, shape) as file:
            order = rng.permutation(n).astype(np.int32)
            file._attention[1] = replace(file._attention[1], cells=order)  # of a layer without a window
            for layer, held in rows.items():
                for given, whole, *pieces in zip(
                    held, *(file.keys_values(layer, *piece) for piece in ((), (0, 3), (3, 33), (33, n)))
                ):
                    assert np.array_equal(whole, np.concatenate(pieces))
                    expected = given[order] if layer == 1 else given
                    assert np.abs(np.where(whole == 0, 0, whole - expected)).max() < 0.06


def test_a_session_byte_by_byte(rng, tmp_path):
    rows, _ = content(FULL, rng, 2)
    write(tmp_path / "state", FULL, StateOptions("ggsn-10", "f32", "f16", True), [7, 9], 1, rows, {})
    expected = b"nsgg" + struct.pack("<IIIII", 10, 2, 7, 9, 4) + b"tiny" + struct.pack("<II3i", 1, 1, 0, 1, 0)
    expected += struct.pack("<II", 1, 2)
    for layer in (0, 1):
        expected += struct.pack("<iQ", 0, 256) + rows[layer][0][:1].tobytes()
    for layer in (0, 1):
        expected += struct.pack("<iII", 1, 2, 64) + rows[layer][1][:1].astype("<f2").T.tobytes()
    assert (tmp_path / "state").read_bytes() == expected


def test_q8_0_has_ggml_s_bytes(rng):
    rows = rng.normal(size=(50, 96)).astype(np.float32)
    rows[3] = 0
    raw = encode(rows, ELEMENTS["q8_0"])
    assert np.array_equal(raw, quantize(rows, GGMLQuantizationType.Q8_0))
    assert np.abs(decode(raw, ELEMENTS["q8_0"]) - rows).max() < 0.03


def test_rotations(rng):
    f16, q8_0 = ELEMENTS["f16"], ELEMENTS["q8_0"]
    sizes = {64: 64, 128: 128, 192: 64, 256: 256, 576: 64, 80: 0, 32: 0}
    for head_dim, expected in sizes.items():
        assert key_rotation(q8_0, {head_dim}) == expected and key_rotation(f16, {head_dim}) == 0
        assert value_rotation(q8_0, {head_dim}) == min(expected, 64)
    assert key_rotation(q8_0, {64, 128}) == value_rotation(q8_0, {0}) == 0
    rows = rng.normal(size=(5, 256)).astype(np.float32)
    turned = rotate(rows, 128)
    assert np.allclose(rotate(turned, 128), rows, atol=1e-5) and not np.allclose(turned, rows)
    assert np.isclose(turned[0, 0], rows[0, :128].sum() / np.sqrt(128), atol=1e-5)
    assert np.isclose(turned[0, 1], (rows[0, :128:2] - rows[0, 1:128:2]).sum() / np.sqrt(128), atol=1e-5)


@pytest.mark.parametrize("value,types", [(65520.0, ["f16"]), (np.inf, TYPES), (np.nan, TYPES), (1e9, ["f16", "q8_0"])])
def test_what_a_type_cannot_hold_is_an_error(value, types, rng, tmp_path):
    rows, _ = content(FULL, rng, 3)
    rows[1][1][2, 5] = value
    for name in types:
        with pytest.raises(InputError, match=rf"^layer 1: the state has a value of magnitude .*{name} cannot hold"):
            write(tmp_path / "state", FULL, StateOptions(keys="f32", values=name), [1, 2, 3], 3, rows, {})


def test_a_server_s_list_of_tokens(rng, tmp_path):
    """llama-server packs it: -1, a version, the count, the tokens, how many of them are media."""
    rows, _ = content(FULL, rng, 3)
    write(tmp_path / "state", FULL, StateOptions(), [5, 6, 7], 3, rows, {})
    whole = (tmp_path / "state").read_bytes()
    for packed, known in (([-1, 1, 3, 5, 6, 7, 0], True), ([-1, 2, 3, 5, 6, 7, 0], False), ([-1, 1, 3], False)):
        head = whole[:8] + struct.pack(f"<I{len(packed)}i", len(packed), *packed)
        (tmp_path / "server").write_bytes(head + whole[24:])
        if known:
            with StateFile(tmp_path / "server", FULL) as file:
                assert file.tokens == [5, 6, 7] and np.abs(file.keys_values(0)[0] - rows[0][0]).max() < 2e-3
        else:
            with pytest.raises(StateError, match="list of tokens"):
                StateFile(tmp_path / "server", FULL)


def test_files_that_are_refused(rng, tmp_path):
    rows, _ = content(FULL, rng, 3)
    path = tmp_path / "state"
    write(path, FULL, StateOptions("ggsn-11"), [5, 6, 7], 2, rows, {})
    whole = path.read_bytes()
    for data, message in (
        (b"", "empty"),
        (b"GGUF" + whole[4:], "no state file"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "version 9 of ggsn is not known; those that are: ggsq-4"),
        (whole[:28] + b"tony" + whole[32:], "of architecture tony, the model of tiny"),
        (whole[:-1], "cut short"),
        (whole + b"x", "goes on behind"),
        (whole[:36] + struct.pack("<I", 0), "state of no token"),
    ):
        path.write_bytes(data)
        with pytest.raises(StateError, match=message):
            StateFile(path, FULL)
    path.write_bytes(whole)
    for other in SHAPES.values():
        if other is not FULL:
            with pytest.raises(StateError):
                StateFile(path, other)
    sliding = SHAPES["sliding"]
    rows, _ = content(sliding, rng, 9)
    write(path, sliding, StateOptions(), list(range(9)), 9, rows, {})
    wider = StateShape("slides", 3, sliding.full, sliding.sliding, 5)
    with StateFile(path, wider) as file:
        assert file.cells == 9


def test_cells_of_a_sliding_cache(rng, tmp_path):
    """At least its window's, and no more than there are."""
    shape = SHAPES["sliding"]
    rows, _ = content(shape, rng, 600)
    sizes = []
    for cells in (None, 1, 5, 40, 4096):
        write(tmp_path / "state", shape, StateOptions(cells=cells), list(range(600)), 600, rows, {})
        sizes.append((tmp_path / "state").stat().st_size)
    of_cell = 2 * 2 * 32 * 2 + 12
    assert [(sizes[-1] - s) // of_cell for s in sizes] == [600 - 5 - 512, 595, 595, 560, 0]
