"""What the command line writes: never in the place of what is wanted, whole or not at all, never for ever."""

import json
import os
import shutil
import signal
import stat
import subprocess
import time

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
from test_cli import ENTRY, TOKENS, kq
from test_cli_score import lines, read, score
from test_cli_shell import needs_jq, shell, tree  # noqa: F401

RECORD = b'{"tokens": [1, 2]}\n'


@pytest.fixture
def model(tmp_path):
    """(a model's file, other names of it by hard and symbolic link)."""
    path, hard, link = tmp_path / "m.gguf", tmp_path / "hard.npy", tmp_path / "link.npy"
    shutil.copy(EXAMPLE, path)
    os.link(path, hard)
    link.symlink_to(path)
    return path, hard, link


def run(path, *args, **kwargs):
    return kq("run", path, "--tokens", TOKENS, "--backend", "cpu", *args, **kwargs)


def refused(done, *words):
    (complaint,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and done.stdout == b"" and all(word in complaint for word in words), complaint


def test_an_output_never_replaces_the_model(model, tmp_path):
    path, *links = model
    for name in links:
        for more in ([], ["--force"]):
            refused(run(path, "--logits", name, *more), str(name), "the model")
    (tmp_path / "in.jsonl").write_bytes(RECORD)
    refused(score(tmp_path / "in.jsonl", "--html", path, "--force"), "GGUF")
    refused(score(tmp_path / "in.jsonl", "-o", path, "--resume"), "GGUF")
    refused(kq("synth", "tiny:Q4_K", path, "--force"), "GGUF")
    assert path.read_bytes() == EXAMPLE.read_bytes()


def test_an_output_never_replaces_an_input(tmp_path):
    ids, records = tmp_path / "ids.npy", tmp_path / "in.jsonl"
    ids.write_text(TOKENS)
    refused(kq("run", EXAMPLE, "--tokens", f"@{ids}", "--logits", ids, "--force"), "the file of --tokens")
    refused(kq("run", EXAMPLE, "-f", ids, "--logits", ids, "--force"), "the file of --file")
    records.write_bytes(RECORD)
    for option in ("-o", "--html"):
        refused(score(records, option, records, "--force"), "the input")
    with open(records, "rb") as file:  # as `< in.jsonl`
        done = subprocess.run([*ENTRY, "score", EXAMPLE, "-o", records], stdin=file, capture_output=True)
    refused(done, "stdin")
    with open(records, "ab") as file:  # as `>> in.jsonl`, which would never end
        done = subprocess.run([*ENTRY, "score", EXAMPLE, records], stdout=file, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2 and b"stdout is the input" in done.stderr
    assert ids.read_text() == TOKENS and records.read_bytes() == RECORD


def test_two_outputs_are_two_files(tmp_path):
    for name in ("x", "./x", tmp_path / "x"):
        command = [*ENTRY, "score", EXAMPLE, "-o", "x", "--html", name]
        done = subprocess.run(command, input=RECORD, capture_output=True, cwd=tmp_path)
        refused(done, "--html", "-o goes to the same file")
    with open(tmp_path / "x.npy", "wb") as stdout:
        command = [*ENTRY, "run", str(EXAMPLE), "--tokens", "1", "--logits", str(tmp_path / "x.npy"), "--force"]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"stdout goes to the same file" in done.stderr
    assert kq("score", EXAMPLE, "-o", "/dev/null", "--html", "/dev/null", stdin=RECORD).returncode == 0


@pytest.mark.parametrize(
    "args,name",
    [
        (["run", EXAMPLE, "--tokens", "1", "--backend", "cpu", "--logits"], "x.npy"),
        (["synth", "tiny:Q4_K"], "x.gguf"),
        (["score", EXAMPLE, "--backend", "cpu", "--html"], "x.html"),
        (["bench", "tiny", "-p", 4, "-r", 1, "--backend", "cpu", "--plot"], "x.svg"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_what_exists_is_replaced_only_by_force_and_keeps_its_mode(args, name, tmp_path):
    if args[0] == "bench":
        pytest.importorskip("matplotlib")
    path, link = tmp_path / name, tmp_path / f"link-{name}"
    path.write_text("a diary")
    path.chmod(0o600)
    link.symlink_to(path)
    refused(kq(*args, link, stdin=RECORD), "--force")
    assert path.read_text() == "a diary"
    assert kq(*args, link, "--force", stdin=RECORD).returncode == 0
    assert link.is_symlink() and path.read_bytes() != b"a diary" and stat.S_IMODE(path.stat().st_mode) == 0o600
    new = tmp_path / f"new-{name}"
    umask = os.umask(0o027)
    try:
        assert kq(*args, new, stdin=RECORD).returncode == 0
    finally:
        os.umask(umask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".kqprefill")]


def test_what_comes_meanwhile_is_not_replaced(tmp_path):
    from kqprefill.cli.outputs import Outputs
    from kqprefill.errors import KqprefillError

    path = tmp_path / "x.npy"
    outputs = Outputs()
    outputs.claim(str(path), "--logits")
    with pytest.raises(KqprefillError, match="exists"), outputs.open(str(path), "--logits") as file:
        file.write(b"ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["x.bin", "x", "x.gguf", "npy", ""])
def test_arrays_have_an_ending(name, tmp_path):
    refused(run(EXAMPLE, "--logits", tmp_path / name if name else ""), ".safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_npz_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with subprocess.Popen(["cat", tmp_path / "x.npz"], stdout=subprocess.PIPE) as reader:
        assert run(EXAMPLE, "--logits", tmp_path / "x.npz").returncode == 0
        (tmp_path / "y.npz").write_bytes(reader.stdout.read())
    with np.load(tmp_path / "y.npz") as arrays:
        assert arrays["logits"].shape == (256,)


# --resume ------------------------------------------------------------------------------------------------------------

RECORDS = [{"tokens": [1, 2, 3], "id": i} for i in range(4)]


@pytest.mark.parametrize(
    "content,line",
    [
        (b"my diary, which has no newline", 1),
        (b'{"index": 1, "n_', 1),
        (b'{"index": 0, "x": 1}\n', 1),
        (b'{"index": true, "n_tokens": 2}\n', 1),
        (b'[{"index": 0}]\n', 1),
        (b'{"index": 0, "n_tokens": 2}\nmy diary', 2),
        (b"\0\0\0\0", 1),
    ],
    ids=range(7),
)
def test_resume_touches_only_its_own(content, line, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(content)
    refused(score("-o", out, "--resume", stdin=lines(RECORDS)), f"line {line} is no result")
    assert out.read_bytes() == content


def test_a_cut_line_goes_only_with_what_it_was_made_of(tmp_path):
    """Until the first new line is there, a resumed output stays as it was."""
    out = tmp_path / "out"
    whole = score(stdin=lines(RECORDS)).stdout
    cut = b"".join(whole.splitlines(keepends=True)[:2]) + b'{"index": 2, "n_tok'
    out.write_bytes(cut)
    other = [RECORDS[0], {"tokens": [1], "id": 7}, *RECORDS[2:]]
    refused(score("-o", out, "--resume", stdin=lines(other)), "another record")
    assert out.read_bytes() == cut
    assert score("-o", out, "--resume", stdin=lines(RECORDS)).returncode == 0 and out.read_bytes() == whole
    assert score("-o", out, "--resume", stdin=lines(RECORDS)).returncode == 0 and out.read_bytes() == whole


def test_resume_takes_its_own_whatever_the_records_carry(tmp_path):
    """Keys of an earlier run's results, which tell with which options that was made."""
    first = score("--per-token", "--top", 2, "--greedy", stdin=lines(RECORDS)).stdout
    again = [{**result, "tokens": [1, 2, 3]} for result in read(first)]
    out = tmp_path / "out"
    args = "--keep-as", "first", "-o", out
    assert score(*args, stdin=lines(again)).returncode == 0
    whole = out.read_bytes()
    assert [line["first"] for line in read(whole)] == read(first)
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2])[:-5])
    assert score(*args, "--resume", stdin=lines(again)).returncode == 0 and out.read_bytes() == whole


def test_skipped_records_are_counted_over_all_runs(tmp_path):
    out = tmp_path / "out"
    data = lines([{"tokens": [999]}, *RECORDS])
    assert score("-o", out, "--on-error", "skip", stdin=data).returncode == 3
    out.write_bytes(out.read_bytes()[:-9])
    done = score("-o", out, "--on-error", "skip", "--resume", stdin=data)
    assert done.returncode == 3 and b"1 of 5 records could not be scored" in done.stderr


# Readers that leave, stall, or are not there -------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.fixture
def much(tmp_path):
    """A file of records whose results are more than a pipe holds."""
    records = [{"tokens": [1, 2], "text": "x" * 3000} for _ in range(100)]
    (tmp_path / "much.jsonl").write_bytes(lines(records))
    return tmp_path / "much.jsonl"


def start(*args, stdout=subprocess.DEVNULL):
    command = [*ENTRY, "score", "--backend", "cpu", EXAMPLE, *args]
    return subprocess.Popen(list(map(str, command)), stdout=stdout, stderr=subprocess.PIPE)


def test_a_pipe_whose_reader_leaves(fifo, much):
    process = start(much, "-o", fifo)
    with open(fifo, "rb") as reader:
        assert json.loads(reader.readline())["index"] == 0
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and b"whoever read it has gone" in said and said.count(b"\n") == 1


def test_a_pipe_that_is_read(fifo, much):
    process = start(much, "-o", fifo)
    with open(fifo, "rb") as reader:
        assert [line["index"] for line in read(reader.read())] == list(range(100))
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0


@pytest.mark.parametrize(
    "case,number",
    [
        ("no reader", signal.SIGTERM),
        ("a stalled reader", signal.SIGTERM),
        ("a stalled reader of stdout", signal.SIGTERM),
        ("a stalled reader of stdout", signal.SIGINT),
    ],
)
def test_the_first_signal_ends_it(case, number, fifo, much):
    process = start(much, "-o", fifo) if "stdout" not in case else start(much, stdout=subprocess.PIPE)
    reader = None
    if case == "a stalled reader":
        reader = os.open(fifo, os.O_RDONLY)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(number)
    try:
        assert process.wait(timeout=20) == 128 + number
    finally:
        process.kill()
        process.communicate()
        if reader is not None:
            os.close(reader)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_reads_gets_whole_lines(much, number):
    process = start(much, "--batch-tokens", 8, stdout=subprocess.PIPE)
    data = process.stdout.readline()
    process.send_signal(number)
    data += process.stdout.read()
    process.communicate()
    assert process.returncode == 128 + number and data.endswith(b"\n")
    assert [line["index"] for line in read(data)] == list(range(data.count(b"\n")))


# Nothing scored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stdin,why", [(b"", "no records"), (b"\n \n", "no records"), (b"x\n{}\n", "none of the 2")])
def test_a_run_that_scores_nothing_is_an_error(stdin, why, tmp_path):
    done = score("--on-error", "skip", "--html", tmp_path / "page", stdin=stdin)
    assert done.returncode == 1 and why in done.stderr.decode() and done.stderr.count(b"\n") == 1
    assert done.stdout.count(b"\n") == (2 if "none" in why else 0) and list(tmp_path.iterdir()) == []


@needs_jq
@pytest.mark.parametrize("line", ["choose.sh no.gguf", "filter.sh no.gguf 9 <examples/texts.jsonl"])
def test_examples_end_with_what_failed(tree, line):  # noqa: F811
    done = shell(tree, f"examples/{line}")
    assert done.returncode == 1 and done.stdout == b"" and b"no.gguf" in done.stderr


@pytest.mark.parametrize("line", ["choose.sh", "filter.sh examples/tiny-qwen3.gguf"])
def test_examples_say_how_they_are_used(tree, line):  # noqa: F811
    done = shell(tree, f"examples/{line}")
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.startswith(b"usage: examples/")


@needs_jq
def test_the_filter_says_that_lines_were_left_out(tree):  # noqa: F811
    texts = (ROOT / "examples/texts.jsonl").read_text().splitlines()
    done = shell(
        tree,
        "examples/filter.sh examples/tiny-qwen3.gguf 1e9",
        input=("\n".join([*texts, '{"id": "bad", "prompt": 5}']) + "\n").encode(),
    )
    assert done.returncode == 3 and done.stdout.count(b"\n") == len(texts)
