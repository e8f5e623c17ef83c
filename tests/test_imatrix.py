"""Importance matrices: sums held against what goes into products, the files byte by byte, and runs that are cut."""

from contextlib import suppress
import io
import json
import struct
import subprocess
import sys

from gguf import GGUFReader
import numpy as np
import pytest

from conftest import CASES, EXAMPLE
import kqprefill
from kqprefill.backends.cpu import ops as cpu_ops
from kqprefill.backends.cpu.functions import normalised
from kqprefill.collector import Squares
from kqprefill.engine.imatrix import Progressed, importance_matrix, read_checkpoint
from kqprefill.engine.imatrix_file import ImportanceMatrix, read_matrix, statistics, write_matrix
from kqprefill.errors import BackendError, InputError, KqprefillError
from kqprefill.gguf import dequantize

CONTEXT = 32


def kq(*args):
    return subprocess.run(
        [sys.executable, "-m", "kqprefill", "imatrix", *map(str, args)], capture_output=True, text=True
    )


def fails(*args, status=2):
    done = kq(*args)
    assert done.returncode == status and done.stdout == "", done
    return done.stderr


def tokens_of(model, rng, chunks):
    return rng.integers(0, model.config.vocab_size, chunks * CONTEXT + 5)


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def test_sums_of_the_first_layer(model, rng):
    """Each chunk a sequence, its first token replaced by BOS, every position counted, the rest left out."""
    tokens = tokens_of(model, rng, 5)
    made = importance_matrix(model, tokens, CONTEXT, bos=7, first=1, most=3).matrix(CONTEXT, "text")
    chunks = tokens[CONTEXT : 4 * CONTEXT].reshape(3, CONTEXT).copy()
    chunks[:, 0] = 7
    w, family = model.family.blocks[0], model.family
    x = dequantize(family.token_embd.tensor.data[chunks.ravel()], family.token_embd.tensor.type)
    h = normalised(x, model.config.norm_epsilon) * dequantize(w.attn_norm.tensor.data, w.attn_norm.tensor.type)
    expected = np.square(h.astype(np.float64)).sum(axis=0)
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = made.entries[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(entry.sums, expected, rtol=1e-6)
        assert entry.counts.tolist() == [3 * CONTEXT]
    assert made.chunks == 3


@pytest.mark.parametrize(
    "case", "qwen3-q4_k qwen3vlmoe-q4_k_m gemma4-q4_k_m qwen35moe-q4_k_m glm4moe-nextn-q3_k_m".split()
)
def test_sums_are_those_of_what_is_multiplied(case, rng, monkeypatch):
    """Held against every product that the CPU makes, caught where it is made."""
    if case not in CASES:
        pytest.skip(f"{case} is not here")
    caught, product = {}, cpu_ops.CpuOps._product

    def catch(ops, a, weight, piece, scale, *more):
        if piece.start == 0 and scale == 1.0:
            name = weight.name.partition("[")[0]
            index = weight.of_stack[0] if weight.of_stack else 0
            sums, rows = caught.setdefault((name, index, weight.name), (0.0, 0))
            squares = np.square(a.astype(np.float64)).sum(axis=0)
            caught[name, index, weight.name] = sums + squares, rows + len(a)
        return product(ops, a, weight, piece, scale, *more)

    monkeypatch.setattr(cpu_ops.CpuOps, "_product", catch)
    with kqprefill.load(CASES[case], backend="cpu") as model:
        tokens = tokens_of(model, rng, 2)
        made = importance_matrix(model, tokens, CONTEXT).matrix(CONTEXT, "text").entries
        matrices = {w.name.partition("[")[0] for block in model.family.blocks for w in block if w.is_matrix}
    assert matrices <= set(made) and all(name.startswith("blk.") for name in made)
    checked = 0
    for (name, index, _), (sums, rows) in caught.items():
        if name.startswith("blk."):
            entry = made[name]
            own = entry.sums.reshape(len(entry.counts), -1)[index]
            np.testing.assert_allclose(own, sums, rtol=1e-9)
            assert entry.counts[index] == rows
            checked += 1
    assert checked >= len(matrices) - 2


def test_the_output_matrix_where_it_is_asked_for(model, rng):
    tokens = tokens_of(model, rng, 1)
    plain, more = (
        importance_matrix(model, tokens, CONTEXT, output=o).matrix(CONTEXT, "").entries for o in (False, True)
    )
    tied = model.family.output is model.family.token_embd
    assert set(more) - set(plain) == (set() if tied else {"output.weight"})


def test_batches_make_no_difference(model, rng):
    tokens = tokens_of(model, rng, 6)
    one = importance_matrix(model, tokens, CONTEXT, batch_tokens=8192)
    for batch_tokens in (1, 2 * CONTEXT):
        other = importance_matrix(model, tokens, CONTEXT, batch_tokens=batch_tokens)
        for names, squares in one.squares.items():
            np.testing.assert_allclose(other.squares[names].sums, squares.sums, rtol=1e-12)


def test_a_run_that_is_resumed(model, rng, tmp_path):
    tokens, whole, seen = tokens_of(model, rng, 5), None, []

    def keep(done, so_far):
        seen.append(done)
        if done == 2:
            with open(tmp_path / "checkpoint", "wb") as file:
                so_far().write(file)

    whole = importance_matrix(model, tokens, CONTEXT, on_chunks=keep, stops=2)
    assert seen == [2, 4, 5]
    resumed = read_checkpoint(tmp_path / "checkpoint")
    assert resumed.chunks == 2
    again = importance_matrix(model, tokens, CONTEXT, resumed=resumed)
    assert set(again.squares) == set(whole.squares)
    for names, squares in whole.squares.items():
        np.testing.assert_allclose(again.squares[names].sums, squares.sums, rtol=1e-13)
        assert np.array_equal(again.squares[names].counts, squares.counts)
    with pytest.raises(InputError, match="the checkpoint is of another"):
        importance_matrix(model, tokens[::-1], CONTEXT, resumed=resumed)


def test_a_checkpoint_that_is_none(rng, tmp_path):
    """Another file, one that was cut short, and one of which any byte has changed: one line."""
    path, kept = tmp_path / "checkpoint", io.BytesIO()
    Progressed(3, {("blk.0.ffn_up.weight",): Squares(np.ones(64), np.array([3]))}, "key").write(kept)
    whole, array = kept.getvalue(), io.BytesIO()
    np.save(array, np.ones(3))
    path.write_bytes(whole)
    assert read_checkpoint(path).chunks == 3
    damaged = [bytearray(whole) for _ in range(300)]
    for data in damaged:
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
    for data in (b"", b"no checkpoint", array.getvalue(), whole[:300], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a checkpoint"):
            read_checkpoint(path)
    for data in damaged:
        path.write_bytes(data)
        with suppress(InputError):  # a byte that nobody reads may be anything
            read_checkpoint(path)


def test_what_is_not_finite_is_an_error(model, rng, monkeypatch):
    monkeypatch.setattr(cpu_ops, "normalised", lambda x, epsilon: x * np.float32(np.inf))
    with pytest.raises(BackendError, match=r"what goes into blk\.0\.attn_k\.weight is not finite"):
        importance_matrix(model, tokens_of(model, rng, 1), CONTEXT)


def some_matrix(rng):
    dense = Squares(rng.random(40) * 1000, np.array([96]))
    stack = Squares(rng.random(3 * 20) * 1000, np.array([64, 0, 33]))
    stack.sums[20:40] = 0
    entries = {"blk.1.ffn_down_exps.weight": stack, "blk.0.attn_q.weight": dense, "blk.1.attn_q.weight": dense}
    return ImportanceMatrix(entries, CONTEXT, ("a.txt", "ü.txt"))


def written(matrix, kind, path):
    with open(path, "wb") as file:
        write_matrix(matrix, kind, file)
    return path


def test_the_gguf(rng, tmp_path):
    """As llama-imatrix lays it out, read by another reader (tools/imatrix/imatrix.cpp: save_imatrix)."""
    matrix = some_matrix(rng)
    path = written(matrix, "gguf", tmp_path / "a.gguf")
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "ü.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": CONTEXT,
    }
    names = sorted(matrix.entries)
    assert [t.name for t in reader.tensors] == [n + s for n in names for s in (".in_sum2", ".counts")]
    shapes = [t.shape.tolist() for t in reader.tensors]
    assert shapes == [[40], [1], [40], [1], [20, 3], [1, 3]]
    for tensor, name in zip(reader.tensors, np.repeat(names, 2), strict=True):
        entry = matrix.entries[name]
        expected = entry.sums if tensor.name.endswith("in_sum2") else entry.counts
        assert np.array_equal(tensor.data.ravel(), expected.astype(np.float32))
    assert path.stat().st_size % 32 == 0


def test_the_dat(rng, tmp_path):
    """Byte by byte (tools/imatrix/imatrix.cpp: save_imatrix_legacy)."""
    matrix = some_matrix(rng)
    data, at = written(matrix, "dat", tmp_path / "a.dat").read_bytes(), 0

    def take(code):
        nonlocal at
        values = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return values[0] if len(values) == 1 else np.array(values)

    assert take("i") == 3
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        assert take(f"{take('i')}s") == name.encode()
        calls, count = take("i"), take("i")
        assert (calls, count) == (-(-entry.counts.max() // CONTEXT), len(entry.sums))
        sums = entry.sums.reshape(len(entry.counts), -1)
        means = np.where(entry.counts[:, None] > 0, sums / np.maximum(entry.counts[:, None], 1), 1)
        np.testing.assert_allclose(take(f"{count}f"), (means * calls).ravel(), rtol=1e-6)
    assert take("i") == 3 and take(f"{take('i')}s") == "ü.txt".encode() and at == len(data)


@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_files_come_back(kind, rng, tmp_path):
    matrix = some_matrix(rng)
    again = read_matrix(written(matrix, kind, tmp_path / "a"), CONTEXT)
    assert set(again.entries) == set(matrix.entries) and again.chunks == 3
    dense = again.entries["blk.0.attn_q.weight"]
    np.testing.assert_allclose(dense.sums, matrix.entries["blk.0.attn_q.weight"].sums, rtol=1e-6)
    assert dense.counts.tolist() == [96]
    both = again + matrix
    assert both.entries["blk.1.ffn_down_exps.weight"].counts.shape == (3,) and both.chunks == 6


def test_matrices_that_do_not_fit(rng):
    matrix = some_matrix(rng)
    other = ImportanceMatrix({"blk.0.attn_q.weight": Squares(np.ones(39), np.array([1]))}, CONTEXT)
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight has 40 sums in one and 39"):
        matrix + other


@pytest.mark.filterwarnings("error")
def test_damaged_files(rng, tmp_path):
    """None is believed: each is an error of one line."""
    matrix = some_matrix(rng)
    for kind in ("gguf", "dat"):
        data = written(matrix, kind, tmp_path / "whole").read_bytes()
        for _ in range(60):
            damaged = bytearray(data[: rng.integers(0, len(data))] if rng.random() < 0.5 else data)
            for at in rng.integers(0, max(1, len(damaged)), 3):
                if damaged:
                    damaged[at] = rng.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                read_matrix(tmp_path / "damaged", CONTEXT)
            except KqprefillError as error:
                assert "\n" not in str(error)
    with pytest.raises(KqprefillError, match="no importance matrix"):
        read_matrix(EXAMPLE, CONTEXT)


def test_statistics():
    a = ImportanceMatrix(
        {
            "blk.0.attn_q.weight": Squares(np.array([4.0, 4.0, 4.0, 4.0]), np.array([2])),
            "blk.1.attn_q.weight": Squares(np.array([8.0, 0.0, 0.0, 0.0]), np.array([2])),
        },
        1,
    )
    even, single = statistics(a)
    assert (even.total, even.mean, even.deviation, even.entropy, even.active) == (8.0, 2.0, 0.0, 2.0, 1.0)
    assert (even.normalised_entropy, even.above, even.cosine) == (1.0, 0.0, None)
    assert (single.largest, single.active, single.entropy, single.above, single.cosine) == (4.0, 0.25, 0.0, 0.25, 0.5)


def test_the_command(tmp_path):
    """A run, its copies and statistics; runs that are added up are as one."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 6)
    common = EXAMPLE, "--file", text, "-c", CONTEXT, "--backend", "cpu"
    whole, both = tmp_path / "whole.gguf", tmp_path / "both.gguf"
    done = kq(*common, "--chunks", 5, "-o", whole, "--save-frequency", 2, "--show-statistics", "--json")
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert (told["version"], told["chunks"], told["context"], told["datasets"]) == (1, 5, CONTEXT, [str(text)])
    assert len(told["statistics"]) == told["tensors"] and {layer["layer"] for layer in told["layers"]} == {0, 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "whole.gguf", "whole.gguf.at_2", "whole.gguf.at_4"]
    first, second = f"{whole}.at_2", tmp_path / "second.dat"
    done = kq(*common, "--from-chunk", 2, "--chunks", 3, "-o", second, "--output-format", "dat", "--in-file", first)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert kq("--in-file", second, "-o", both, "-c", CONTEXT).returncode == 0
    a, b = read_matrix(whole, CONTEXT), read_matrix(both, CONTEXT)
    assert a.chunks == b.chunks == 5 and set(a.entries) == set(b.entries)
    for name, entry in a.entries.items():
        np.testing.assert_allclose(b.entries[name].sums, entry.sums, rtol=1e-6)
    assert "blk.1.ffn_down.weight" in kq("--in-file", both, "--show-statistics").stdout


def test_checkpoints_of_the_command(tmp_path):
    text, out = tmp_path / "text", tmp_path / "out.gguf"
    text.write_bytes(bytes(range(32, 127)) * 6)
    common = EXAMPLE, "--file", text, "-c", CONTEXT, "--backend", "cpu", "-o", out
    checkpoint = tmp_path / "out.gguf.checkpoint"
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        ids = model.tokenize(text.read_text(), parse_special=False)
        with open(checkpoint, "wb") as file:
            importance_matrix(model, ids, CONTEXT, most=len(ids) // CONTEXT, stops=3, on_chunks=_leave(file, 3))
    assert "an earlier run has left it; --resume goes on from there, --force begins anew" in fails(*common)
    assert "another model, text, context" in fails(*common, "--chunks", 2, "--resume")
    done = kq(*common, "--resume")
    assert done.returncode == 0 and "3 chunks are done" in done.stderr and not checkpoint.exists()
    whole = tmp_path / "whole.gguf"
    done = kq(*common[:-1], whole, "--checkpoint", 1e-9, "--batch-tokens", CONTEXT)  # one after each chunk
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "whole.gguf.checkpoint").exists()
    a, b = read_matrix(out, CONTEXT), read_matrix(whole, CONTEXT)
    assert all(np.array_equal(a.entries[name].counts, e.counts) for name, e in b.entries.items())
    assert all(np.allclose(a.entries[name].sums, e.sums, rtol=1e-7) for name, e in b.entries.items())


def _leave(file, chunks):
    """An on_chunks that writes a checkpoint after so many."""
    return lambda done, so_far: so_far().write(file) if done == chunks else None


def test_an_output_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"too short a text for one chunk, which is found out once the model's file is read")
    for out, why in ((tmp_path, "Is a directory"), (tmp_path / "none" / "x", "No such file or directory")):
        done = fails(EXAMPLE, "-f", text, "-o", out, "--backend", "cpu", status=1)
        assert f"--output {out} cannot be written: {why}" in done
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_wrong_usage(tmp_path):
    text, out = tmp_path / "text", tmp_path / "out.gguf"
    text.write_bytes(b"some text")
    assert "either as --file FILE or as --tokens" in fails(EXAMPLE, "-o", out)
    assert "name the file to write" in fails(EXAMPLE, "-f", text)
    assert "needs a MODEL" in fails("-f", text, "-o", out)
    assert "files to add up (--in-file)" in fails("-o", out)
    assert "has 9 tokens, but a chunk takes 512" in fails(EXAMPLE, "-f", text, "-o", out, "--backend", "cpu")
    assert "no importance matrix" in fails("--in-file", text, "-o", out, status=1)
    other = written(
        ImportanceMatrix({"blk.0.ffn_up.weight": Squares(np.ones(9), np.array([1]))}, 512), "dat", tmp_path / "x"
    )
    done = fails(EXAMPLE, "-f", text, "-o", out, "--backend", "cpu", "--in-file", other)
    assert "x: 9 sums of blk.0.ffn_up.weight, which has inputs of 256 columns in" in done
    odd = {"blk.²": Squares(np.ones(9), np.array([1])), "blk.².x": Squares(np.ones(9), np.array([1]))}
    assert [row.cosine for row in statistics(ImportanceMatrix(odd, 512))] == [None, None]
    empty = struct.pack("<ii4sii", 1, 4, b"name", 1, 0)
    (tmp_path / "empty").write_bytes(empty)
    assert "empty: the sums of name are not sums of squares" in fails(
        "--in-file", tmp_path / "empty", "-o", out, status=1
    )
    assert "No such file" in fails("--in-file", tmp_path / "none", "-o", out, status=1)
    assert not out.exists()
    out.write_bytes(b"GGUF")
    assert "is a GGUF, which is never replaced" in fails(EXAMPLE, "-f", text, "-o", out, "--force")
