"""--precision of the commands: what it is set by, what reports say of it, and outputs that another one has begun."""

import io
import json
import re

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.cli.commands import cli
from kqprefill.engine.divergence import divergence
from kqprefill.engine.imatrix import importance_matrix, read_checkpoint
from kqprefill.engine.windows import Windows
from kqprefill.errors import InputError
from test_cli import kq
from test_cli_folder import manifest
from test_cli_score import lines, read, score
from test_imatrix import fails

CPU, INT8 = ["--backend", "cpu"], ["--precision", "int8"]
RUNNING = "run score perplexity kld embed rerank bench plan imatrix serve".split()
RECORDS = [{"tokens": [1, 2, 3], "id": "a"}, {"tokens": [4, 5]}, {"tokens": [6, 7, 8, 9]}]


@pytest.fixture(scope="module")
def models():
    with (
        kqprefill.load(EXAMPLE, backend="cpu") as exact,
        kqprefill.load(EXAMPLE, backend="cpu", precision="int8") as rounded,
    ):
        yield exact, rounded


@pytest.fixture
def by_environment(monkeypatch):
    monkeypatch.setenv("KQPREFILL_PRECISION", "int8")


def logprobs_of(model):
    return [scored.logprob for scored in model.score([record["tokens"] for record in RECORDS])]


# The option, and the variable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNING)
def test_every_command_that_runs_a_model_has_it(name):
    (option,) = [option for option in cli.commands[name].params if option.name == "precision"]
    assert option.type.choices == ("exact", "int8") and option.envvar == "KQPREFILL_PRECISION"
    assert option.default == "exact" and option.show_envvar
    named = {name for name, command in cli.commands.items() if any(p.name == "backend" for p in command.params)}
    assert named == set(RUNNING)  # all that have --backend


def test_what_it_is_set_by(models, monkeypatch):
    expected = [[model.prefill([72, 101]).logit, model.precision] for model in models]

    def said(*args):
        told = json.loads(kq("run", EXAMPLE, "--tokens", "72,101", "--json", *CPU, *args).stdout)
        return [pytest.approx(told["logit"], rel=1e-6), told["precision"]]

    assert [said(), said(*INT8)] == expected
    monkeypatch.setenv("KQPREFILL_PRECISION", "int8")
    assert [said("--precision", "exact"), said()] == expected


@pytest.mark.parametrize("name", RUNNING)
def test_a_value_that_is_unknown(name, monkeypatch):
    arguments = {"rerank": ["-p", "x"]}.get(name, [])
    wrong = kq(name, EXAMPLE, *arguments, *CPU, "--precision", "int4")
    assert wrong.returncode == 2 and b"--precision" in wrong.stderr and b"'int4'" in wrong.stderr
    monkeypatch.setenv("KQPREFILL_PRECISION", "fast")
    wrong = kq(name, EXAMPLE, *arguments, *CPU)
    assert wrong.returncode == 2 and b"KQPREFILL_PRECISION" in wrong.stderr and b"'fast'" in wrong.stderr


# Reports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["md", "json", "jsonl", "csv"])
def test_bench_rows(output, by_environment):
    text = kq("bench", EXAMPLE, "-p", "4,8", "-r", 1, "-o", output, *CPU).stdout.decode()
    if output == "md":
        head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
        assert [row[head.index("precision")] for row in rows] == ["int8", "int8"]
    elif output == "csv":
        head, *rows = (line.split(",") for line in text.splitlines())
        assert [row[head.index("precision")] for row in rows] == ["int8", "int8"]
    else:
        rows = json.loads(text) if output == "json" else read(text.encode())
        assert [row["precision"] for row in rows] == ["int8", "int8"]


@pytest.mark.parametrize(
    "args,stdin",
    [
        (["run", EXAMPLE, "--tokens", "1,2"], b""),
        (["score", EXAMPLE], lines(RECORDS)),
        (["embed", EXAMPLE, "--pooling", "mean"], lines(RECORDS[1:])),
        (["rerank", EXAMPLE, "-p", "What?", "--answers", "y,n", "--text"], b"This.\n"),
        (["perplexity", EXAMPLE, "-f", ROOT / "LICENSE", "-c", 64, "--chunks", 2], b""),
        (["kld", EXAMPLE, "-f", ROOT / "LICENSE", "-c", 64, "--chunks", 2], b""),
        (["imatrix", EXAMPLE, "-f", ROOT / "LICENSE", "-c", 64, "--chunks", 2, "-o", "/dev/null"], b""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_summaries(args, stdin, by_environment):
    done = kq(*args, "-v", *CPU, stdin=stdin)
    assert done.returncode == 0 and re.search(rb"cpu \(.*\), int8$", done.stderr, re.MULTILINE), done.stderr


def test_summaries_of_what_is_exact(tmp_path):
    assert re.search(rb"cpu \(.*\), exact$", kq("run", EXAMPLE, "--tokens", "1", "-v", *CPU).stderr, re.MULTILINE)
    (tmp_path / "in.jsonl").write_bytes(lines(RECORDS))
    for precision in ("exact", "int8"):
        folder = f"{tmp_path}/{precision}/"
        done = score(tmp_path / "in.jsonl", "-o", folder, "-v", "--precision", precision)
        assert f"tokens/s, {precision}; 3 records in {folder}" in done.stderr.decode()


def test_objects(by_environment):
    text = ["-f", ROOT / "LICENSE", "-c", 64, "--chunks", 2, "--json", *CPU]
    assert json.loads(kq("perplexity", EXAMPLE, *text).stdout)["precision"] == "int8"
    assert json.loads(kq("plan", EXAMPLE, "--json", *CPU).stdout)["precision"] == "int8"
    assert ", int8, prompts of" in " ".join(kq("plan", EXAMPLE, *CPU).stdout.decode().split())


def test_the_page(tmp_path, by_environment):
    for precision in ("exact", "int8"):
        page = tmp_path / f"{precision}.html"
        assert score("--html", page, "--precision", precision, stdin=lines(RECORDS)).returncode == 0
        assert re.search(rf"3 records, 6 scored tokens; cpu \(.*\), {precision}</small>", page.read_text())


def test_importance_matrices(tmp_path, by_environment):
    args = ["imatrix", EXAMPLE, "-f", ROOT / "LICENSE", "-c", 64, "--chunks", 2, "-o", tmp_path / "out", "--json", *CPU]
    assert json.loads(kq(*args).stdout)["precision"] == "int8"
    assert json.loads(kq("imatrix", "--in-file", tmp_path / "out", "--json").stdout)["precision"] is None


@pytest.mark.parametrize("device", ["0", "0,1"])
def test_a_plan_for_a_gpu(device):
    """Says which precision it is for, and what layers take then."""
    args = ["plan", "qwen3-8b:Q4_K_M", "--backend", "cuda", "--device", device, "--vram", "20G", "--json"]
    found = {}
    for precision in ("exact", "int8"):
        described = json.loads(kq(*args, "--precision", precision).stdout)
        assert described["precision"] == precision
        devices = described.get("devices", [described])
        found[precision] = sum(n for own in devices for name, n in own["parts"].items() if name.startswith("layers"))
    assert 1.4 < found["int8"] / found["exact"] < 2
    said = kq(*args[:-1], *INT8).stdout.decode()
    assert ", int8, prompts of" in said and "layers that stay, in int8" in said


def test_the_server_says_it(by_environment):
    pytest.importorskip("uvicorn", reason="needs pip install '.[serve]'")
    from test_serve_http import served

    with served() as server:
        assert server.ask("GET", "/v1/models")[2]["data"][0]["precision"] == "int8"


# Outputs that are gone on with ---------------------------------------------------------------------------------------


def test_lines_are_those_of_the_model(models, tmp_path):
    """Where it is not exact, each line says so, also of a record that is left out; else none does."""
    bad = lines([*RECORDS, {"tokens": []}])
    for model in models:
        found = read(score("--on-error", "skip", "--precision", model.precision, stdin=bad).stdout)
        assert [line.get("logprob") for line in found[:3]] == logprobs_of(model) and "error" in found[3]
        marks = [{k: v for k, v in line.items() if k in ("precision", "id")} for line in found]
        mark = {} if model.precision == "exact" else {"precision": "int8"}
        assert marks == [mark | {"id": "a"}, mark, mark, mark]


@pytest.mark.parametrize("done", [1, 3])
@pytest.mark.parametrize("begun,now", [("exact", "int8"), ("int8", "exact")])
def test_lines_of_another_precision_are_not_gone_on_with(begun, now, done, tmp_path):
    """Also where there is nothing left to do."""
    (tmp_path / "in").write_bytes(lines(RECORDS))
    whole = score(tmp_path / "in", "--precision", begun).stdout
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:done]))
    before = out.read_bytes()
    other = score(tmp_path / "in", "-o", out, "--resume", "--precision", now)
    assert other.returncode == 2 and out.read_bytes() == before
    assert other.stderr.decode() == (
        f"kqprefill: {out} was begun at precision {begun}, and this is {now}: give --precision {begun}, or name "
        "another file\n"
    )
    assert score(tmp_path / "in", "-o", out, "--resume", "--precision", begun).returncode == 0
    assert out.read_bytes() == whole


def test_records_with_a_precision_of_their_own(tmp_path):
    """Handed on as any other key where results have none; else under a name."""
    (tmp_path / "in").write_bytes(lines([{**record, "precision": "int8"} for record in RECORDS]))
    whole, out = score(tmp_path / "in").stdout, tmp_path / "out.jsonl"
    assert [line["precision"] for line in read(whole)] == ["int8"] * 3
    out.write_bytes(whole.splitlines(keepends=True)[0])
    assert score(tmp_path / "in", "-o", out, *INT8, "--resume").returncode == 2
    assert score(tmp_path / "in", "-o", out, "--resume").returncode == 0 and out.read_bytes() == whole
    refused = score(tmp_path / "in", *INT8)
    assert refused.returncode == 1 and b'the key "precision" is one of the result\'s own' in refused.stderr
    kept = read(score(tmp_path / "in", *INT8, "--keep-as", "mine").stdout)
    assert [(line["precision"], line["mine"]["precision"]) for line in kept] == [("int8", "int8")] * 3
    assert score(tmp_path / "in", *INT8, "--keep-as", "precision").returncode == 2


@pytest.mark.parametrize("begun,now", [("exact", "int8"), ("int8", "exact")])
def test_folders_of_another_precision_are_not_gone_on_with(begun, now, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(RECORDS))
    inputs, folder = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out"
    assert score(*inputs, "-o", f"{folder}/", "--precision", begun).returncode == 0
    activations = {"exact": "float32", "int8": "int8"}
    assert manifest(folder)["precision"]["activations"] == activations[begun]
    next(folder.glob("*.jsonl")).unlink()
    other = score(*inputs, "-o", f"{folder}/", "--resume", "--precision", now)
    assert other.returncode == 2 and other.stderr.count(b"\n") == 1
    words = f'other precision (activations: "{activations[begun]}", now "{activations[now]}")'
    assert words in other.stderr.decode()
    assert score(*inputs, "-o", f"{folder}/", "--resume", "--precision", begun).returncode == 0


@pytest.mark.parametrize("begun", [0, 1])
def test_checkpoints_of_another_precision_are_not_gone_on_with(begun, models, tmp_path):
    tokens, parts = list(range(200)), []
    first = models[begun]
    importance_matrix(first, tokens, 32, batch_tokens=64, on_chunks=lambda done, so_far: parts.append(so_far()))
    out = tmp_path / "out.gguf"
    with open(f"{out}.checkpoint", "wb") as file:
        parts[0].write(file)
    assert read_checkpoint(f"{out}.checkpoint").precision == first.precision
    common = [EXAMPLE, "--tokens", ",".join(map(str, tokens)), "-c", 32, "-o", out, "--resume", *CPU]
    told = fails(*common, "--precision", models[1 - begun].precision).splitlines()[-1]
    how = f"was begun at precision {first.precision}, and this is {models[1 - begun].precision}"
    assert told == f"kqprefill: the checkpoint {how}: give --precision {first.precision}, or --force begins anew"
    assert kq("imatrix", *common, "--precision", first.precision).returncode == 0


def test_a_checkpoint_of_an_earlier_release_is_exact(models, tmp_path):
    kept = io.BytesIO()
    importance_matrix(models[0], list(range(64)), 32).write(kept)
    arrays = dict(np.load(io.BytesIO(kept.getvalue())))
    about = json.loads(arrays["arr_0"].tobytes())
    del about["precision"]
    arrays["arr_0"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    assert read_checkpoint(tmp_path / "old.npz").precision == "exact"


# Against itself ------------------------------------------------------------------------------------------------------

TEXT = ["-f", ROOT / "LICENSE", "-c", 64, "--chunks", 6]


def test_kld_of_a_model_against_itself(models, by_environment):
    done = kq("kld", EXAMPLE, *TEXT, "--json", *CPU)
    told = json.loads(done.stdout)
    exact, rounded = models
    windows = Windows.of(exact.tokenize((ROOT / "LICENSE").read_text()), 64, 6, None, models)
    found = divergence(rounded, exact, windows)
    assert told["kld"] == pytest.approx(found.kld.value, rel=1e-6) and 0 < told["kld"] < 1e-3
    assert told["kld_quantiles"]["0.99"] == pytest.approx(found.kld_at[0.99], rel=1e-6)
    assert told["base_perplexity"] == pytest.approx(found.base_perplexity.value) and told["same_top"] > 0.8
    assert (told["model"], told["base"]) == (str(EXAMPLE), str(EXAMPLE))
    assert (told["precision"], told["base_precision"]) == ("int8", "exact")
    table = kq("kld", EXAMPLE, *TEXT, *CPU).stdout.decode()
    for words in ("Mean    KLD:", "Median  KLD:", "99.0%   KLD:", "Same top p:", "Mean    Δp:", "Mean PPL(base)"):
        assert words in table


def test_kld_against_another_is_at_exact(tmp_path):
    """--precision is MODEL's alone."""
    text = [*TEXT, "--json", *CPU]
    of_itself = json.loads(kq("kld", EXAMPLE, *text, *INT8).stdout)
    against = json.loads(kq("kld", EXAMPLE, "--against", EXAMPLE, *text, *INT8).stdout)
    assert against == of_itself
    assert kq("perplexity", EXAMPLE, *TEXT, *CPU, "--save-logits", tmp_path / "base").returncode == 0
    told = json.loads(kq("kld", EXAMPLE, "--base", tmp_path / "base", "--json", *CPU, *INT8).stdout)
    assert told["kld"] == pytest.approx(of_itself["kld"], rel=0.05)
    assert (told["precision"], told["base_precision"]) == ("int8", None)


def test_kld_exact_against_nothing():
    done = kq("kld", EXAMPLE, *TEXT, *CPU)
    assert done.returncode == 2 and b"compare MODEL at --precision int8 with itself" in done.stderr


# Beside the commands -------------------------------------------------------------------------------------------------


def test_the_class_for_pipelines(models):
    pa = pytest.importorskip("pyarrow", reason="needs pip install '.[parquet]'")
    from kqprefill.ray.scorer import Scorer

    scorer = Scorer(str(EXAMPLE), backend="cpu", precision="int8")
    assert scorer.model.precision == "int8" and scorer.precision["activations"] == "int8"
    found = scorer(pa.table({"tokens": [record["tokens"] for record in RECORDS]}))
    assert found["logprob"].to_pylist() == logprobs_of(models[1])
    scorer.model.close()


def test_the_harness_model(monkeypatch):
    pytest.importorskip("lm_eval", reason="needs pip install '.[lm-eval]'")
    from kqprefill.lm_eval import KqprefillLM

    def precision(**given):
        made = KqprefillLM(str(EXAMPLE), backend="cpu", **given)
        made.model.close()
        return made.model.precision

    assert [precision(), precision(precision="int8")] == ["exact", "int8"]
    with pytest.raises(InputError, match="model_args: precision 'fast' is unknown"):
        precision(precision="fast")
    monkeypatch.setenv("KQPREFILL_PRECISION", "int8")
    assert [precision(), precision(precision="exact")] == ["int8", "exact"]
    monkeypatch.setenv("KQPREFILL_PRECISION", "fast")
    with pytest.raises(InputError, match="KQPREFILL_PRECISION: precision 'fast' is unknown; choose one of exact, int8"):
        precision()


def test_a_cluster_is_told(tmp_path):
    pytest.importorskip("ray", reason="needs pip install '.[ray]'")
    (tmp_path / "in.jsonl").write_bytes(lines(RECORDS))
    done = score(tmp_path / "in.jsonl", "-o", f"{tmp_path}/out/", "--ray=local", "--replicas", 1, *INT8)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "out")["precision"]["activations"] == "int8"
