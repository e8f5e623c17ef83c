"""The command line through its real entry point."""

import io
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time
from types import SimpleNamespace

from click.testing import CliRunner
import numpy as np
import pytest

from conftest import EXAMPLE, log_softmax
import kqprefill
from kqprefill.cli.commands import cli
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile

COMMAND = Path(sys.executable).with_name("kqprefill")
ENTRY = [str(COMMAND)] if COMMAND.exists() else [sys.executable, "-m", "kqprefill"]
TOKENS = "72,101,108,108,111"


def kq(*args, stdin=None, entry=ENTRY):
    return subprocess.run([*entry, *map(str, args)], input=stdin, capture_output=True)


def run(*args, **kwargs):
    return kq("run", EXAMPLE, "--backend", "cpu", *args, **kwargs)


@pytest.fixture(scope="module")
def expected():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        return model.prefill([72, 101, 108, 108, 111], logits="all")


def test_prints_the_token_and_nothing_else(expected):
    done = run("--tokens", TOKENS)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected.token}\n".encode(), b"")


def test_python_dash_m(expected):
    done = run("--tokens", TOKENS, entry=[sys.executable, "-m", "kqprefill"])
    assert done.stdout == f"{expected.token}\n".encode()


def test_tokens_from_anywhere(expected, tmp_path):
    (tmp_path / "ids").write_text("72 101\n108,108\t111\n")
    answers = [
        run("--tokens", "72 101 108 108 111"),
        run("--tokens", "-", stdin=b"72, 101, 108\n108 111"),
        run("--tokens", f"@{tmp_path / 'ids'}"),
    ]
    assert [done.stdout for done in answers] == [f"{expected.token}\n".encode()] * 3


def test_json(expected):
    answer = json.loads(run("--tokens", TOKENS, "--json").stdout)
    assert answer["token"] == expected.token and answer["logit"] == pytest.approx(expected.logit, rel=1e-5)
    assert answer["logprob"] == pytest.approx(log_softmax(expected.logits[-1])[expected.token], abs=1e-5)
    assert answer["prompt_tokens"] == 5 and answer["backend"] == "cpu" and isinstance(answer["text"], str)
    assert answer["device"] and set(answer["timings"]) == {"load", "prefill"}


def test_logits_files(expected, tmp_path):
    last, everything = tmp_path / "last.npy", tmp_path / "all.npy"
    assert run("--tokens", TOKENS, "--logits", last).stdout == f"{expected.token}\n".encode()
    assert run("--tokens", TOKENS, "--logits", everything, "--all-positions").returncode == 0
    assert np.load(last).shape == (256,) and np.load(last).dtype == np.float32
    assert np.array_equal(np.load(everything), expected.logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npy", "last.npy"]


def test_logits_to_stdout(expected):
    done = run("--tokens", TOKENS, "--logits", "-", "--all-positions")
    assert np.array_equal(np.load(io.BytesIO(done.stdout)), expected.logits)


@pytest.mark.parametrize(
    "args,status,complaint",
    [
        (["--tokens", "1,x"], 2, "'x' is not a token id"),
        (["--tokens", "256"], 2, "token 256 at position 0 is not in the vocabulary (0 to 255)"),
        (["--tokens", "-1"], 2, "token -1"),
        (["--tokens", ""], 2, "empty"),
        (["--tokens", "@/no/such/file"], 1, "/no/such/file"),
        (["--tokens", " ".join(["1"] * 4097)], 2, "context length of 4096"),
        (["--tokens", "1", "--logits", "/no/such/folder/x.npy"], 1, "/no/such/folder/x.npy cannot be written"),
        (["--tokens", "1", "--logits", "/"], 1, "cannot be written"),
        (["--tokens", "1", "--all-positions"], 2, "--logits"),
        (["--tokens", "1", "--logits", "-", "--json"], 2, "stdout"),
        ([], 2, "--tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_errors(args, status, complaint):
    done = run(*args)
    assert done.returncode == status and done.stdout == b""
    assert complaint in done.stderr.decode() and "Traceback" not in done.stderr.decode()


def test_bad_models(tmp_path, rng):
    (tmp_path / "noise.gguf").write_bytes(rng.bytes(1000))
    for path in (tmp_path / "noise.gguf", tmp_path / "none.gguf"):
        done = kq("run", path, "--tokens", "1")
        assert done.returncode == 1 and done.stdout == b""
        assert done.stderr.decode().startswith(f"kqprefill: {path}: ") and done.stderr.count(b"\n") == 1


def test_a_failed_run_leaves_no_file(tmp_path):
    done = run("--tokens", "256", "--logits", tmp_path / "x.npy")
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_the_old_file(tmp_path):
    (tmp_path / "x.npy").write_text("old")
    run("--tokens", "256", "--logits", tmp_path / "x.npy", "--force")
    assert (tmp_path / "x.npy").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("args", [[], ["--logits", "-"], ["--logits", "/dev/full"]], ids=str)
def test_a_full_disk_is_one_line(args):
    with open("/dev/full", "wb") as full:
        command = [*ENTRY, "run", str(EXAMPLE), "--backend", "cpu", "--tokens", TOKENS, *args]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"kqprefill: ")
    assert not os.path.isfile("/dev/full")  # written to, not replaced


def test_logits_through_a_pipe_and_a_link(expected, tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.npy", tmp_path / "file.npy"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    assert run("--tokens", TOKENS, "--logits", pipe).returncode == 0
    assert np.load(io.BytesIO(reader.communicate(timeout=30)[0])) == pytest.approx(expected.logits[-1], abs=1e-5)
    file.write_text("old")
    link.symlink_to(file)
    assert run("--tokens", TOKENS, "--logits", link, "--force").returncode == 0
    assert link.is_symlink() and np.load(file) == pytest.approx(expected.logits[-1], abs=1e-5)


def test_unusable_gpu_is_said(expected):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    auto = subprocess.run([*ENTRY, "run", str(EXAMPLE), "--tokens", TOKENS], env=environment, capture_output=True)
    assert auto.stdout == f"{expected.token}\n".encode()
    assert auto.stderr.startswith(b"kqprefill: running on the CPU: ") and auto.stderr.count(b"\n") == 1
    command = [*ENTRY, "run", str(EXAMPLE), "--tokens", TOKENS, "--backend", "cuda"]
    forced = subprocess.run(command, env=environment, capture_output=True)
    assert forced.returncode == 1 and forced.stdout == b"" and forced.stderr.count(b"\n") == 1


def test_verbose_says_what_was_done():
    done = run("--tokens", TOKENS, "--verbose")
    assert b"5 tokens" in done.stderr and b"tokens/s" in done.stderr


@pytest.mark.parametrize("output", ["md", "json", "jsonl", "csv"])
def test_bench(output):
    done = kq("bench", "tiny:Q4_K_M", "-p", "16,32", "-r", "2", "-o", output, "--backend", "cpu")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    if output == "md":
        cells = [[cell.strip() for cell in line.split("|")[6:8]] for line in text.splitlines()[2:]]
        assert cells == [["exact", "pp16"], ["exact", "pp32"]]
        return
    rows = {
        "json": lambda: json.loads(text),
        "jsonl": lambda: [json.loads(line) for line in text.splitlines()],
        "csv": lambda: [dict(zip(text.splitlines()[0].split(","), line.split(","))) for line in text.splitlines()[1:]],
    }[output]()
    assert [int(row["prompt_tokens"]) for row in rows] == [16, 32]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)


def test_bench_detail_accounts_for_the_work():
    """Stages in every format. The operations are the shape's: 2 a weight and token, 4 a width and pair of tokens."""
    flags = "-p", "32", "-r", "1", "--detail", "--backend", "cpu", "-o"
    row = json.loads(kq("bench", "tiny:Q4_K", *flags, "jsonl").stdout)
    stages = row["stages"]
    assert list(stages) == ["linear", "attention", "rest", "head"] and all(s["ms"] > 0 for s in stages.values())
    family = read_model(SyntheticFile.named("tiny:Q4_K"))
    weights = [w for block in family.blocks for w in block if len(w.shape) == 2]
    done = {name: s["tflops"] * 1e12 * s["ms"] / 1e3 for name, s in stages.items() if s["tflops"]}
    assert done["linear"] == pytest.approx(2 * 32 * sum(w.shape[0] * w.shape[1] for w in weights))
    assert done["head"] == pytest.approx(2 * family.config.vocab_size * family.config.embedding_length)
    pairs = 32 * 33 // 2
    assert done["attention"] == pytest.approx(4 * pairs * family.config.q_width * len(family.blocks))
    read = stages["linear"]["gb_per_s"] * 1e9 * stages["linear"]["ms"] / 1e3
    assert read == pytest.approx(sum(w.tensor.nbytes for w in weights))
    assert "linear_tflops" in kq("bench", "tiny:Q4_K", *flags, "csv").stdout.decode().splitlines()[0]
    table = kq("bench", "tiny:Q4_K", *flags, "md").stdout.decode()
    assert all(f"| {stage} " in table for stage in stages)


def test_starting_imports_no_more_than_it_needs():
    """The whole gguf package and rich take longer to import than a small model takes to run."""
    code = (
        "import sys, kqprefill.engine.model, kqprefill.backends.cuda.backend; print({'gguf', 'rich'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"set()\n"


def test_first_layers():
    """bench says between what the whole model's rates are, once it has seen each kind of layer; plan and synth take
    those layers; a file has all of its own."""
    flags = "-r", "1", "--backend", "cpu", "-p"
    row = json.loads(kq("bench", "tiny", "--layers", "1", *flags, "16", "-o", "jsonl").stdout)
    assert row["model"] == "tiny:Q4_K_M (1 of 2 layers)" and (row["layers"], row["whole_layers"]) == (1, 2)
    rate, (by_bytes, by_number) = row["tokens_per_second"], SyntheticFile.named("tiny", 1).shares()
    assert by_bytes < by_number == 0.5
    assert row["whole_tokens_per_second_least"] == pytest.approx(rate * by_bytes)
    assert row["whole_tokens_per_second_most"] == pytest.approx(rate * by_number)
    said = kq("bench", "tiny", "--layers", "1", *flags, "16,32").stdout.decode().splitlines()[-1]
    assert re.fullmatch(r"All 2 layers, extrapolated from these 1: pp16 [\d.]+ to [\d.]+ t/s, pp32 .* t/s", said)
    plan = kq("plan", "gemma4-31b", "--layers", "3", "--backend", "cpu").stdout
    assert plan.startswith(b"gemma4-31b:Q4_K_M (3 of 60 layers) on the CPU")
    for args, wrong in (
        (("bench", EXAMPLE), b"is a file; only a SHAPE:RECIPE is made with fewer layers"),
        (("plan", "no-such.gguf"), b"no-such.gguf is a file"),
        (("bench", "tiny"), b"tiny:Q4_K_M: --layers 3: it has 2 layers"),
    ):
        done = kq(*args, "--layers", "3")
        assert done.returncode == 2 and wrong in done.stderr and done.stdout == b""


def test_what_has_no_room_is_refused(tmp_path, monkeypatch):
    """In a line that says how many layers have; before anything is made."""
    from kqprefill.backends import budget

    monkeypatch.setattr(budget, "free_host_memory", lambda: 20 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=64 << 30))
    for args, wrong in (
        (["bench", "deepseek-v3"], r"takes? 10.3\d GiB of main memory, .* is 10.00 GiB: give --layers 7 or fewer"),
        (["bench", "deepseek-v3:F32"], r"of main memory, .*: give --layers 3 or fewer"),
        (
            ["synth", "deepseek-v3", str(tmp_path / "x")],
            r"x: deepseek-v3:Q4_K_M takes 376.61 GiB, and 64.00 GiB are .*: ",
        ),
    ):
        done = CliRunner().invoke(cli, args)
        assert isinstance(done.exception, kqprefill.InputError) and re.search(wrong, str(done.exception))
    assert not list(tmp_path.iterdir())


def test_bench_refuses():
    for args in (
        ["no-such-shape:Q4_K"],
        ["tiny:Q9_K"],
        ["tiny", "-p", "0"],
        ["tiny", "-p", "5000"],
        ["tiny", "-p", "a"],
    ):
        done = kq("bench", *args, "--backend", "cpu")
        assert done.returncode == 2 and done.stdout == b"" and b"Traceback" not in done.stderr


def test_bench_can_pause():
    """A pause before each of two repetitions, and none in what is measured."""
    args = ["bench", "tiny", "-p", "64", "-r", "2", "--backend", "cpu", "-o", "json"]
    start = time.perf_counter()
    (row,) = json.loads(kq(*args, "--delay", "0.7").stdout)
    assert time.perf_counter() - start > 1.4 and row["tokens_per_second"] > 64 / 0.7
    assert kq(*args, "--delay", "-1").returncode == 2


def test_bench_can_warm_up():
    """For some time, which is not measured."""
    args = ["bench", "tiny", "-p", "16", "-r", "1", "--backend", "cpu", "-o", "json"]
    start = time.perf_counter()
    (row,) = json.loads(kq(*args, "--warm-up", "4").stdout)
    assert time.perf_counter() - start > 4 and row["warm_up_seconds"] == 4 and row["tokens_per_second"] > 16 / 4
    assert kq(*args, "--warm-up", "inf").returncode == 2


def test_plan():
    done = kq("plan", "qwen3-32b:Q4_K_M", "--vram", "8G", "-p", "8192")
    text = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b""
    assert "of 8.00 GiB that may be taken" in text and "layers that stay" in text
    assert "are streamed, and the embedding's rows" in text
    assert "bound by arithmetic" in text and "streaming is free from about" in text
    plan = json.loads(kq("plan", "qwen3-32b:Q4_K_M", "--vram", "8G", "-p", "8192", "--json").stdout)
    assert sorted(plan["resident_layers"] + plan["streamed_layers"]) == list(range(64))
    assert plan["planned_bytes"] == sum(plan["parts"].values()) <= plan["budget_bytes"] == 8 << 30
    assert 0 < plan["streamed_bytes"] < 20e9 and plan["bus_seconds"] < plan["compute_seconds"]


@pytest.mark.parametrize(
    "args,status,complaint",
    [
        (["qwen3-32b", "--vram", "1G"], 1, b"tokens need at least 2."),
        (["qwen3-32b", "--vram", "lots"], 2, b"memory budget"),
        (["qwen3-32b", "--vram", "8G", "-p", "50000"], 2, b"context"),
        (["no-such-model", "--vram", "8G"], 1, b"no file, and there is no shape 'no-such-model'; there are tiny"),
        (["qwen3-32", "--vram", "8G"], 1, b"did you mean qwen3-32b or"),
        (["qwen3-8b:Q4_KM", "--vram", "8G"], 2, b"there is no recipe 'Q4_KM'; did you mean Q4_K_M or"),
    ],
)
def test_plan_refuses(args, status, complaint):
    done = kq("plan", *args)
    assert done.returncode == status and complaint in done.stderr and done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def test_cache_and_doctor(tmp_path):
    from kqprefill.backends.cuda.device.compiler import KernelCache, Program, Target

    folder = tmp_path / "cache"
    KernelCache(folder).get(Program("scales.cu"), Target("cubin", "sm_80"))
    (folder / "mine.txt").write_text("not yours to remove")
    environment = {**os.environ, "KQPREFILL_CACHE_DIR": str(folder)}

    def kq(*args):
        return subprocess.run([*ENTRY, *args], capture_output=True, env=environment)

    shown = json.loads(kq("cache", "--json").stdout)
    assert (shown["folder"], shown["kernels"]) == (str(folder), 1) and shown["bytes"] > 1000
    health = json.loads(kq("doctor", "--json").stdout)
    assert health["found"]["kernel cache"].startswith(f"{folder}: 1 programs") and health["found"]["gguf"]
    done = kq("doctor")
    assert done.returncode == (0 if health["usable"] else 1) and b"Traceback" not in done.stderr
    assert health["usable"] or any("the CPU will run" in problem for problem in health["problems"])
    assert json.loads(kq("cache", "--clear", "--json").stdout)["kernels"] == 1
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    folder.chmod(0o777)
    assert "every start compiles" in " ".join(json.loads(kq("doctor", "--json").stdout)["problems"])


@pytest.mark.gpu
def test_a_budget_on_the_command_line(tmp_path):
    """Streamed or resident, the same token; too little is one line."""
    path = tmp_path / "model.gguf"
    kq("synth", "qwen3-0.6b:Q4_K_M", path)
    tokens = ",".join(map(str, range(1000)))
    answers = [kq("run", path, "--tokens", tokens, "-v", *args) for args in ([], ["--vram", "930M"])]
    assert answers[0].stdout == answers[1].stdout != b""
    assert b" 0 are streamed" in answers[0].stderr and b" 0 are streamed" not in answers[1].stderr
    done = kq("run", path, "--tokens", tokens, "--vram", "100M")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"1000 tokens need at least" in done.stderr


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q3_K", "Q8_K", "BF16"])
def test_synth_makes_a_model_that_runs(recipe, tmp_path):
    path = tmp_path / "model.gguf"
    assert kq("synth", f"tiny:{recipe}", path).returncode == 0
    with kqprefill.load(path, backend="cpu") as model:
        assert np.isfinite(model.prefill([1, 2, 3], logits="last").logits).all()


def test_the_example_is_small():
    assert EXAMPLE.stat().st_size < 1 << 20
