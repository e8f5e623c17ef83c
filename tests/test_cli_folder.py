"""`kqprefill score` into a folder, in one process: blocks, manifest, resuming, Parquet."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from conftest import EXAMPLE
from test_cli import ENTRY, kq
from test_cli_score import lines, read, score
from test_python import documented

WHAT_FOLDERS_KEEP = "_kqprefill"


def records(rng, count, **more):
    made = [{"tokens": rng.integers(0, 256, rng.integers(2, 60)).tolist(), "id": i, **more} for i in range(count)]
    return made


def results(folder):
    """{a file's place among the inputs: its lines in order}, and that nothing half written is there."""
    found = {}
    names = sorted(path.name for path in folder.iterdir() if path.name != WHAT_FOLDERS_KEEP)
    for name in names:
        number = name.partition("-")[0]
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            own = pq.read_table(folder / name).to_pylist()
        else:
            own = read((folder / name).read_bytes())
        found.setdefault(int(number), []).extend(own)
    assert not list(folder.rglob("*.tmp"))
    return found


def manifest(folder):
    return json.loads((folder / WHAT_FOLDERS_KEEP / "manifest.json").read_bytes())


def without_index(found):
    return [{key: value for key, value in line.items() if key != "index"} for line in found]


def test_each_record_once_in_order(tmp_path, rng):
    """What one file of results would have, cut into blocks; empty lines count in an index, which is a line's place."""
    texts = tmp_path / "in" / "deeper"
    texts.mkdir(parents=True)
    one, two = records(rng, 200), records(rng, 50)
    two[3] = {"tokens": [1, 2], "choices": [[3], [4, 5]], "id": 3}
    (tmp_path / "in" / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(one)[:-1])
    (texts / "a.ndjson").write_bytes(b"\n" + lines(two))
    (tmp_path / "in" / "_passed_over.jsonl").write_bytes(b"{}\n")
    (tmp_path / "in" / "other.txt").write_bytes(b"{}\n")
    done = score(tmp_path / "in", "-o", f"{tmp_path}/out/", "--block", "2K", "--per-token")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = results(tmp_path / "out")
    plain = [read(score("--per-token", stdin=lines(own)).stdout) for own in (one, two)]
    by_path = {Path(entry["path"]).name: found[at] for at, entry in enumerate(manifest(tmp_path / "out")["inputs"])}
    assert by_path["b.jsonl"] == plain[0]
    assert without_index(by_path["a.ndjson"]) == without_index(plain[1])
    assert [line["index"] for line in by_path["a.ndjson"]] == list(range(1, 51))
    said = manifest(tmp_path / "out")
    assert said.keys() == documented()["kqprefill score -o FOLDER/"][0]
    assert said["done"] and said["records"] == 250 and said["blocks"] > 8 and said["bad"] == 0
    assert said["n_tokens"] == sum(len(record["tokens"]) - 1 for record in one + two[:3] + two[4:]) + 3
    assert said["precision"]["backend"] == "cpu" and said["model"]["architecture"] == "qwen3"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, module_rng):
    """(a folder of inputs that take some seconds, the folder that an undisturbed run makes)."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in").mkdir()
    for name in ("a", "b"):
        (folder / "in" / f"{name}.jsonl").write_bytes(lines(records(module_rng, 400)))
    assert score(folder / "in", "-o", f"{folder}/whole/", "--block", "3K").returncode == 0
    return folder / "in", folder / "whole"


def names(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_killed_and_resumed_nothing_is_lost_or_twice(corpus, tmp_path, rng):
    inputs, whole = corpus
    out, kills = tmp_path / "out", 0
    for _ in range(5):
        more = ["--resume"] if out.exists() else ["--block", "3K"]
        command = [*ENTRY, "score", EXAMPLE, inputs, "-o", f"{out}/", "--backend", "cpu", *more]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = len(names(out)) if out.exists() else 0
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and not (out.exists() and len(names(out)) > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        journal = out / WHAT_FOLDERS_KEEP / "blocks.jsonl"
        if rng.random() < 0.5 and journal.stat().st_size:  # as if it had been killed before or within a line
            os.truncate(journal, max(0, journal.stat().st_size - int(rng.integers(1, 200))))
        if rng.random() < 0.5:  # as if the machine had gone before a file was on disk
            victim = out / sorted(names(out))[0]
            os.truncate(victim, victim.stat().st_size // 2)
    assert kills
    done = score(inputs, "-o", f"{out}/", "--resume")
    assert (done.returncode, done.stderr) == (0, b"")
    assert names(out) == names(whole) and not list(out.rglob("*.tmp"))
    said, undisturbed = manifest(out), manifest(whole)
    assert {**said, "model": 0} == {**undisturbed, "model": 0}


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on(corpus, tmp_path, number, status):
    inputs, whole = corpus
    out = tmp_path / "out"
    command = [*ENTRY, "score", EXAMPLE, inputs, "-o", f"{out}/", "--block", "3K", "--backend", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (out.exists() and names(out)) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1].decode()
    count = sum(map(len, results(out).values()))
    assert said == f"kqprefill: interrupted: {count} records are done in {out}/; --resume goes on from there\n"
    assert process.returncode == status and count < 800 and names(out).items() <= names(whole).items()


def test_folders_are_not_mixed_up(corpus, tmp_path, monkeypatch):
    inputs, _ = corpus
    (tmp_path / "in").mkdir()
    for path in inputs.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    assert score(tmp_path / "in", "-o", f"{out}/", "--block", "3K").returncode == 0
    before = names(out)

    def refused(words, *args, model=EXAMPLE, source=tmp_path / "in", output=out, status=2):
        done = kq("score", model, source, "-o", f"{output}/", "--backend", "cpu", *args)
        said = done.stderr.decode()
        assert done.returncode == status and said.count("\n") == 1 and words in said, said
        assert names(out) == before and manifest(out)["done"]

    refused("--resume goes on with them")
    refused("other options (top: 0, now 2)", "--resume", "--top", 2)
    refused("other options (block_bytes: 3072, now 4096)", "--resume", "--block", "4K")
    refused("a.jsonl is missing now", "--resume", source=tmp_path / "in" / "b.jsonl")
    refused("it lies in", output=tmp_path / "in" / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    refused("holds something else", output=tmp_path / "notes")
    refused("a.jsonl is in it", output=tmp_path)
    refused("stdin cannot be cut", source="-")
    made = kq("synth", "tiny:Q8_0", tmp_path / "other.gguf")
    assert made.returncode == 0
    refused("made with another model", "--resume", model=tmp_path / "other.gguf")
    refused("no file has such a name", source=tmp_path / "in" / "*.none", output=tmp_path / "x", status=1)
    refused("is given twice", tmp_path / "in" / "a.jsonl", output=tmp_path / "x")
    path = tmp_path / "in" / "b.jsonl"
    data = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"tokens": [1, 2]}\n')
    refused("b.jsonl has", "--resume")
    path.write_bytes(data.replace(b'"id": 17}', b'"id": 71}'))
    refused("have changed since", "--resume")
    path.write_bytes(data)
    assert score(tmp_path / "in", "-o", f"{out}/", "--resume").returncode == 0 and names(out) == before
    assert not (tmp_path / "x").exists()
    for args, words in (
        ((tmp_path / "in", "-o", tmp_path / "f.jsonl"), "is scored into a folder"),
        ((path, "-o", tmp_path / "f.jsonl", "--block", "1K"), "--block: with an output folder"),
        ((path, "-o", f"{out}/", "--html", tmp_path / "page.html"), "--html: of an output that is a file"),
        ((path, "-o", f"{out}/", "--ray", "model.gguf"), "write --ray=auto"),
        ((path, "-o", f"{out}/", "--replicas", 2), "give --ray too"),
    ):
        done = score(*args)
        assert done.returncode and words in " ".join(done.stderr.decode().split()), done.stderr
    assert not (tmp_path / "f.jsonl").exists()
    monkeypatch.setenv("KQPREFILL_RAY", "auto")  # for runs with folders
    monkeypatch.setenv("KQPREFILL_BLOCK", "1K")
    assert score(stdin=b'{"tokens": [1, 2]}\n').returncode == 0


def test_blocks_that_were_cut_are_not_read_again(tmp_path, rng):
    """What a run that goes on knows of an input; whatever it knows, blocks are the same."""
    from kqprefill.corpus.inputs import blocks_of

    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b"x" * int(rng.integers(0, 300)) + b"\n" for _ in range(200)) + b"end")
    blocks = list(blocks_of(str(path), 0, 1000))
    assert [block.first for block in blocks[1:]] == [block.first + block.count for block in blocks[:-1]]
    assert sum(block.count for block in blocks) == 201 and blocks[-1].end == path.stat().st_size
    for _ in range(10):
        known = {block.number: block for block in blocks if rng.random() < 0.5}
        assert list(blocks_of(str(path), 0, 1000, known)) == blocks
    path.write_bytes(b"")
    assert list(blocks_of(str(path), 0, 1000, {block.number: block for block in blocks})) == blocks


def test_another_process_writes_it(corpus, tmp_path):
    inputs, _ = corpus
    out = tmp_path / "out"
    command = [*ENTRY, "score", EXAMPLE, inputs, "-o", f"{out}/", "--block", "3K", "--backend", "cpu"]
    first = subprocess.Popen(command)
    while not (out.exists() and names(out)) and first.poll() is None:
        time.sleep(0.01)
    second = score(inputs, "-o", f"{out}/", "--resume")
    first.kill()
    first.communicate()
    assert second.returncode == 2 and second.stderr.endswith(b"out: another process is writing it\n")


def test_bad_records_are_named_by_file_and_line(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    good = b'{"tokens": [3, 4]}\n'
    path.write_bytes(good * 5 + b"{\n" + good * 3)
    done = score(path, "-o", f"{out}/", "--block", "40")
    assert done.returncode == 1 and done.stderr.startswith(f"kqprefill: {path}: line 6: no JSON".encode())
    assert results(out)[0] and all("error" not in line for line in results(out)[0]) and not manifest(out)["done"]
    done = score(path, "-o", f"{out}/", "--resume", "--on-error", "skip")
    assert done.returncode == 3 and b"1 of 9 records" in done.stderr and done.stderr.count(b"\n") == 1
    found = results(out)[0]
    assert [line["index"] for line in found] == list(range(9)) and manifest(out)["bad"] == 1
    assert found[5]["error"].startswith(f"{path}: line 6: no JSON") and "n_tokens" in found[6]
    path.write_bytes(b"{}\n")
    done = score(path, "-o", f"{tmp_path}/none/", "--on-error", "skip")
    assert done.returncode == 1 and b"none of the 1 records" in done.stderr
    path.write_bytes(b"\n")
    done = score(path, "-o", f"{tmp_path}/empty/")
    assert done.returncode == 1 and done.stderr == f"kqprefill: {path}: there are no records\n".encode()


# Parquet -------------------------------------------------------------------------------------------------------------


def table_of(pa, rng, rows):
    from datetime import datetime
    from decimal import Decimal

    return pa.table(
        {
            "tokens": pa.array([rng.integers(0, 256, 5).tolist() for _ in range(rows)], pa.list_(pa.int32())),
            "choices": pa.array([[[1], [2, 3]] if i % 3 == 0 else None for i in range(rows)]),
            "id": pa.array(range(rows), pa.uint16()),
            "when": pa.array([datetime(2026, 1, 1 + i % 28, 3) for i in range(rows)], pa.timestamp("us")),
            "price": pa.array([Decimal(i) / 4 for i in range(rows)], pa.decimal128(12, 2)),
            "raw": pa.array([bytes([i % 256]) if i % 5 else None for i in range(rows)]),
            "nested": pa.array([{"a": [i, None], "b": "é"} for i in range(rows)]),
            "weight": pa.array([float("nan") if i == 0 else i / 2 for i in range(rows)], pa.float32()),
        }
    )


def test_parquet_keeps_its_columns(tmp_path, rng):
    pa = pytest.importorskip("pyarrow", reason="needs pip install '.[parquet]'")
    import pyarrow.parquet as pq

    table = table_of(pa, rng, 100)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=23)
    args = ("--top", 1, "--per-token", "--block", "1K")
    assert score(tmp_path / "in.parquet", "-o", f"{tmp_path}/out/", *args).stderr == b""
    parts = [pq.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert len(parts) > 5
    whole = pa.concat_tables(parts)  # one schema for all
    kept = table.drop(["tokens", "choices"])
    assert whole.select(kept.column_names).schema == kept.schema
    assert repr(whole.select(kept.column_names).to_pylist()) == repr(kept.to_pylist())
    plain = read(
        score("--top", 1, "--per-token", stdin=lines(_asked(row) for row in table.to_pylist())).stdout,
    )
    for row, line in zip(whole.to_pylist(), plain):
        assert row["index"] == line["index"] and row["error"] is None and row["best"] == line.get("best")
        for given, expected in zip(row["choices"] or [row], line.get("choices", [line])):
            assert given["n_tokens"] == expected["n_tokens"] and given["logprob"] == expected["logprob"]
            assert given["token_logprobs"] == pytest.approx(expected["token_logprobs"], rel=1e-6)
            assert given["top_tokens"] == expected["top_tokens"]
    assert score(tmp_path / "in.parquet", "-o", f"{tmp_path}/out/", *args, "--resume").returncode == 0


def _asked(row):
    return {key: row[key] for key in ("tokens", "choices") if row[key] is not None}


def test_parquet_from_and_to_lines(tmp_path, rng):
    pa = pytest.importorskip("pyarrow", reason="needs pip install '.[parquet]'")
    import pyarrow.parquet as pq

    made = [{"tokens": [1, 2, 3], "id": i, "other": [None, {"x": 1.5}, "é\ud800"][i % 3]} for i in range(30)]
    (tmp_path / "in.jsonl").write_bytes(lines(made))
    assert score(tmp_path / "in.jsonl", "-o", f"{tmp_path}/p/", "--format", "parquet", "--block", "500").returncode == 0
    parts = [pq.read_table(path) for path in sorted((tmp_path / "p").glob("*.parquet"))]
    back = [json.loads(row["extras"]) for row in pa.concat_tables(parts).to_pylist()]
    assert len(parts) > 2 and back == [{"id": r["id"], "other": r["other"]} for r in made]
    pq.write_table(table_of(pa, rng, 6), tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", "-o", f"{tmp_path}/l/", "--format", "jsonl").returncode == 0
    first, second = results(tmp_path / "l")[0][:2]
    assert first["when"] == "2026-01-01T03:00:00" and first["weight"] == "NaN" and first["raw"] is None
    assert second["raw"] == "AQ==" and second["price"] == "0.25" and second["nested"] == {"a": [1, None], "b": "é"}
    kept = score(tmp_path / "in.parquet", "-o", f"{tmp_path}/k/", "--keep-as", "mine")
    assert kept.returncode == 0 and results(tmp_path / "k")[0][1]["mine"]["id"] == 1


def test_bad_rows_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pip install '.[parquet]'")
    import pyarrow.parquet as pq

    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a b", None, "c d"], "n": [1, 2, 3]}), path)
    done = score(path, "-o", f"{tmp_path}/out/")
    assert done.returncode == 1 and done.stderr.startswith(f"kqprefill: {path}: row 2: give either".encode())
    done = score(path, "-o", f"{tmp_path}/out/", "--resume", "--on-error", "skip")
    found = results(tmp_path / "out")[0]
    assert done.returncode == 3 and f"{path}: row 2: " in found[1]["error"] and [f["n"] for f in found] == [1, 2, 3]
    pq.write_table(pa.table({"prompt": ["a b"], "index": [1]}), path)
    done = score(path, "-o", f"{tmp_path}/other/")
    assert done.returncode == 2 and b'the column "index"' in done.stderr and b"--keep-as" in done.stderr
    path.write_bytes(b"PAR1 no table")
    done = score(path, "-o", f"{tmp_path}/third/")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"no Parquet file" in done.stderr


@pytest.mark.parametrize("args", [["in.parquet"], ["in.jsonl", "--format", "parquet"]], ids=str)
def test_without_pyarrow_it_says_what_to_install(args, tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('no', name='pyarrow')\n")
    for name in ("in.parquet", "in.jsonl"):
        (tmp_path / name).write_text('{"tokens": [1, 2]}\n')
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [*ENTRY, "score", EXAMPLE, *args, "-o", "out/", "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"kqprefill[parquet]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ray_is_not_imported_unless_asked_for():
    code = "import sys; from kqprefill.cli.commands import cli; print({'ray', 'pyarrow', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"set()\n"
