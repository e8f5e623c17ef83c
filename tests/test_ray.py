"""Scoring over Ray (the extra `ray`): the class for pipelines, and `kqprefill score --ray`; with a cluster, slow."""

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.errors import InputError, KqprefillError
from test_cli import ENTRY
from test_cli_folder import manifest, names, records, results
from test_cli_score import lines, score

pa = pytest.importorskip("pyarrow", reason="needs pip install '.[ray]'")
NO_STATISTICS = {"RAY_USAGE_STATS_ENABLED": "0"}


def needs_ray():
    return pytest.importorskip("ray", reason="needs pip install '.[ray]'")


@pytest.fixture
def scorer():
    made = []

    def make(**options):
        from kqprefill.ray import Scorer

        made.append(Scorer(str(EXAMPLE), backend="cpu", **options))
        return made[-1]

    yield make
    for one in made:
        one.model.close()


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def test_a_batch_of_any_kind(scorer, model, rng):
    """A pyarrow.Table, NumPy columns as Ray makes them, a DataFrame: the same columns of the same types come out."""
    rows = [rng.integers(0, 256, 5).tolist() for _ in range(8)]
    table = pa.table({"tokens": rows, "id": pa.array(range(8), pa.uint16()), "name": list("abcdefgh")})
    ragged = np.empty(8, object)
    ragged[:] = [np.array(row) for row in rows]
    own = scorer(top=2, per_token=True)
    found = own(table)
    expected = list(model.score(rows, top=2))
    assert found["logprob"].to_pylist() == [scored.logprob for scored in expected]
    assert found["top_tokens"].to_pylist() == [scored.top_tokens.tolist() for scored in expected]
    assert found["n_tokens"].type == pa.int64() and found["token_logprobs"].type == pa.list_(pa.float32())
    assert found.select(["id", "name"]) == table.select(["id", "name"]) and "index" not in found.column_names
    for tokens in (ragged, np.array(rows)):
        batch = {"tokens": tokens, "id": np.arange(8, dtype=np.uint16), "name": np.array(list("abcdefgh"))}
        assert own(batch).equals(found)
    with_choices = own({"tokens": ragged, "choices": np.array([[[1], [2]]] * 8, object)})
    assert with_choices.schema.field("choices") == found.schema.field("choices")
    assert [len(choices) for choices in with_choices["choices"].to_pylist()] == [2] * 8
    pd = pytest.importorskip("pandas", reason="comes with pip install '.[ray]'")
    assert own(pd.DataFrame({"tokens": rows}))["logprob"].to_pylist() == found["logprob"].to_pylist()


def test_bad_records_of_a_batch(scorer):
    table = pa.table({"prompt": ["Hello", None, "there"], "n": [1, 2, 3]})
    with pytest.raises(KqprefillError, match="a batch: row 2: give either"):
        scorer()(table)
    found = scorer(on_error="skip", keep_as="mine")(table)
    assert [error is None for error in found["error"].to_pylist()] == [True, False, True]
    assert found["mine"].to_pylist() == [{"n": 1}, {"n": 2}, {"n": 3}] and found["logprob"].null_count == 1
    with pytest.raises(InputError, match='the column "logprob"'):
        scorer()(pa.table({"prompt": ["Hello"], "logprob": [1.0]}))
    with pytest.raises(InputError, match="--top 257"):
        scorer(top=257)


def test_it_goes_to_another_process():
    """Ray sends the class, and errors of its objects, by pickling."""
    import pickle

    from kqprefill.corpus.inputs import Block
    from kqprefill.corpus.scorer import Settings
    from kqprefill.ray import Scorer

    block = Block("in.jsonl", 0, 1, 2, 3, 4, 5, 6, 7)
    sent = (Scorer, Settings(), block, InputError("no"))
    came = pickle.loads(pickle.dumps(sent))
    assert came[:3] == sent[:3] and type(came[3]) is InputError and str(came[3]) == "no"


def test_without_ray_it_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('no', name='ray')\n")
    (tmp_path / "in.jsonl").write_text('{"tokens": [1, 2]}\n')
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [*ENTRY, "score", EXAMPLE, "in.jsonl", "-o", "out/", "--ray"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"kqprefill[ray]" in done.stderr
    assert not (tmp_path / "out").exists()


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


@pytest.mark.parametrize(
    "nodes,backend,replicas,vram,expected",
    [
        ([node(8, 4), node(8, 4), node(8, 4, False)], "auto", None, None, (8, "cuda", 1, 1)),
        ([node(8, 4)], "cuda", 3, None, (3, "cuda", 1, 1)),
        ([node(8, 4)], "auto", 8, "20G", (8, "cuda", 1, 0.5)),
        ([node(8, 4)], "auto", 8, None, "give --vram"),
        ([node(8, 4)], "cpu", None, None, (1, "cpu", 8, 0)),
        ([node(2), node(2), node(64)], "auto", None, None, (3, "cpu", 21, 0)),
        ([node(2), node(2)], "auto", 2, None, (2, "cpu", 2, 0)),
        ([node(2), node(2)], "auto", 5, None, "has 4 CPUs"),
        ([node(2)], "cuda", None, None, "no GPU"),
        ([], "auto", None, None, "has 0 CPUs"),
    ],
)
def test_how_replicas_share_a_cluster(nodes, backend, replicas, vram, expected):
    needs_ray()
    from kqprefill.ray.cluster import Share, share_of

    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            share_of(nodes, backend, replicas, vram)
    else:
        assert share_of(nodes, backend, replicas, vram) == Share(*expected)


def test_stragglers_are_named_once(monkeypatch):
    from kqprefill.corpus.inputs import Block
    from kqprefill.corpus.scorer import Done
    from kqprefill.ray import rates

    said, now = [], [0.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    own = rates.Rates(said.append)
    own.begin(3)
    own.name(2, "replica 2 (10.0.0.7, an H100, process 1)")
    blocks = [Block("in.jsonl", 0, number, 10 * number, 10, 0, 0, 1000, 0) for number in range(9)]
    own.look(2, blocks[8], -1000.0)  # nothing is usual yet
    for number, block in enumerate(blocks[:6]):
        own.add(number % 2, block, Done("x", 1, 10, 0, 90, 100 if number % 2 else 1000, 8.0))
    assert said == []
    now[0] = 23.0
    own.look(2, blocks[8], 0.0)
    assert said == []
    now[0] = 30.0
    own.look(2, blocks[8], 0.0)
    own.look(2, blocks[8], 0.0)
    late = "replica 2 (10.0.0.7, an H100, process 1) is late: it has had in.jsonl: lines 81 to 90 for 30 s"
    assert said == [f"{late}; 8 s are usual"]
    now[0] = 61.0
    own.tell(1)
    assert said[1].startswith("60 records, 54 tokens/s, 2 replicas") and "; slow: replica 1 12" in said[1]
    assert "1 replicas wait" in said[1] and "replica 0: 3 blocks, 30 records, 125 tokens/s" in list(own.table())


# With a cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_of_this_machine(tmp_path, rng):
    needs_ray()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(records(rng, 200)))
    (tmp_path / "in" / "b.jsonl").write_bytes(lines(records(rng, 20)) + b"{\n")
    args = ("--block", "2K", "--on-error", "skip")
    assert score(tmp_path / "in", "-o", f"{tmp_path}/whole/", *args).returncode == 3
    over = ("--ray=local", "--replicas", 2)
    done = score(tmp_path / "in", "-o", f"{tmp_path}/out/", *args, *over, "-v")
    said = done.stderr.decode()
    assert done.returncode == 3 and done.stdout == b"", said
    assert said.count("tokens/s") == 3 and "replica 0 (" in said and "1 of 221 records" in said
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    for key in ("blocks", "records", "bad", "n_tokens", "model", "precision", "options", "done"):
        assert manifest(tmp_path / "out")[key] == manifest(tmp_path / "whole")[key]
    done = score(tmp_path / "in", "-o", f"{tmp_path}/stopped/", "--block", "2K", *over)
    said = done.stderr.decode()
    assert done.returncode == 1 and said.startswith(f"kqprefill: {tmp_path}/in/b.jsonl: line 21: no JSON"), said
    assert said.count("\n") == 1 and done.stdout == b"" and not manifest(tmp_path / "stopped")["done"]
    done = score(tmp_path / "in", "-o", f"{tmp_path}/stopped/", "--resume", "--on-error", "skip")  # without Ray
    assert done.returncode == 3 and results(tmp_path / "stopped") == results(tmp_path / "whole")
    done = score(tmp_path / "in", "-o", f"{tmp_path}/x/", "--ray", "127.0.0.1:1")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"--ray 127.0.0.1:1: " in done.stderr


@pytest.mark.slow
def test_a_pipeline_of_ray_data(tmp_path, rng):
    """In a process of its own: Ray stays with whoever has started it."""
    needs_ray()
    pytest.importorskip("ray.data", reason="needs pip install '.[ray]'")
    code = f"""
import ray
from kqprefill.ray import Scorer

ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
made = [{{"tokens": [i % 256, 2, 3], "id": i}} for i in range(60)]
for form in ("pyarrow", "numpy"):
    scores = ray.data.from_items(made).map_batches(
        Scorer,
        fn_constructor_kwargs={{"model": {str(EXAMPLE)!r}, "backend": "cpu"}},
        batch_format=form,
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = sorted(scores.take_all(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(60)) and all(row["n_tokens"] == 2 for row in rows)
print("well", rows[7]["logprob"])
"""
    environment = {**os.environ, **NO_STATISTICS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=tmp_path)
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        (expected,) = model.score([[7, 2, 3]])
    assert done.stdout.decode().splitlines()[-1:] == [f"well {expected.logprob}"], done.stderr.decode()[-2000:]


@pytest.mark.slow
def test_workers_nodes_and_drivers_that_die(rng):
    """A share of what tests/bench/ray_faults.py does."""
    needs_ray()
    seed = str(rng.integers(1 << 32))
    command = [sys.executable, ROOT / "tests/bench/ray_faults.py", "--rounds", "1", "--records", "2500", "--seed", seed]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **NO_STATISTICS})
    table = [line for line in done.stdout.decode().splitlines() if line.startswith("| 0 |")]
    assert done.returncode == 0 and len(table) == 1 and table[0].endswith("| 2500 | equal |"), done.stdout.decode()
