"""What a person sees of a run on a terminal: how far it is, early; tables that fit; nothing that a terminal obeys."""

import json
import os
import pty
import re
import signal
import subprocess
import threading

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.cli.common import columns_of, table
from kqprefill.cli.interrupts import Interrupted, raise_signal
from kqprefill.cli.records import Records
from kqprefill.engine.packing import packs
from kqprefill.engine.scoring import Item
from test_cli import ENTRY, kq
from test_cli_score import lines, read, score
from test_cli_shell import in_a_terminal


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def plain(shown):
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


# Early, and by layer -------------------------------------------------------------------------------------------------


def test_first_batches_are_small(model):
    items = [Item([1] * 100) for _ in range(400)]
    sizes = [sum(piece.tokens for piece, _ in group) for group in packs(items, 8192, 512)]
    assert sizes[:6] == [500, 1000, 2000, 4000, 8100, 8100] and sum(sizes) == 40_000
    assert [sum(p.tokens for p, _ in g) for g in packs(items[:5], 200, 512)] == [200, 200, 100]


def test_a_corpus_of_one_batch_gives_results_before_its_end(model):
    taken = []

    def records():
        for index in range(80):
            taken.append(index)
            yield [1] * 100

    next(model.score(records()))
    assert len(taken) == 8  # and half of the next batch


def test_scoring_is_heard_by_layer(model):
    heard = []
    results = model.score([[1] * 300] * 3, progress=lambda *what: heard.append(what))
    next(results)
    layers = len(model.family.blocks)
    assert heard == [("prefill", i + 1, layers) for i in range(layers)]
    assert len(list(results)) == 2 and len(heard) == 2 * layers


def test_perplexity_is_heard_within_a_batch(model, rng):
    from kqprefill.engine.perplexity import perplexity

    heard = []
    found = perplexity(model, rng.integers(0, 256, 1000), 50, progress=lambda *what: heard.append(what))
    assert found.windows == 20 and {stage for stage, _, _ in heard} == {"windows"}
    done = [done / total for _, done, total in heard]
    assert len(done) >= 4 and 0 < done[0] < done[1] <= 0.6 and done[-1] == 1


@pytest.mark.parametrize(
    "args,words",
    [
        (["score", EXAMPLE, "{}", "-o", "/dev/null"], r"score .*%.* left .*records, \d+ tokens/s"),
        (["bench", "tiny", "-p", "600", "-r", "2"], r"bench .*%.* left .*pp600, \d+ tokens/s"),
        (["perplexity", EXAMPLE, "--file", "{}", "-c", "64"], r"windows .*%.* left .*\d+ tokens/s"),
    ],
    ids=["score", "bench", "perplexity"],
)
def test_bars_say_how_fast_and_how_long(args, words, tmp_path, rng):
    path = tmp_path / "in"
    path.write_bytes(lines([{"tokens": rng.integers(0, 256, 300).tolist()} for _ in range(6)]))
    status, shown = in_a_terminal(*[str(arg).format(path) for arg in args], "--backend", "cpu", KQPREFILL_QUIET="")
    assert status == 0 and re.search(words, plain(shown)), plain(shown)


@pytest.mark.parametrize(
    "args,words",
    [(["-o", "out"], r"\d+ records are done in out; --resume goes on from there"), ([], r"\d+ records are done")],
)
def test_an_interrupt_says_what_is_done(args, words, tmp_path):
    with subprocess.Popen(
        [*ENTRY, "score", EXAMPLE, "--backend", "cpu", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        process.stdin.write(b'{"tokens": [1, 2]}\n' * 2)
        process.stdin.flush()
        out = tmp_path / "out"
        for _ in range(2):
            if not args:
                process.stdout.readline()
        while args and not (out.exists() and out.read_bytes().count(b"\n") == 2):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
    assert process.returncode == 130, said
    assert re.fullmatch(f"kqprefill: interrupted: {words}\n", said) and "2 records" in said


def test_an_interrupt_is_heard_that_woke_nobody():
    """One that comes just before the wait for records, here made by giving it to another thread."""
    reading, writing = os.pipe()

    def interrupt():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        heard.append(ended.wait(10))
        os.close(writing)  # the records end, so that this does not hang where nothing was heard

    heard: list[bool] = []
    ended, before = threading.Event(), signal.signal(signal.SIGINT, raise_signal)
    other = threading.Timer(0.2, interrupt)
    try:
        with pytest.raises(Interrupted):
            other.start()
            list(Records([f"/dev/fd/{reading}"], lambda *_: None))
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
        other.join()
        os.close(reading)
    assert heard == [True]


# Tables --------------------------------------------------------------------------------------------------------------


def test_numbers_stand_to_the_right():
    drawn = table(["name", "n", "share"], [["a", "5", "1.5%"], ["日本", "1234", ""]]).splitlines()
    assert drawn == [
        "| name |    n | share |",
        "| ---- | ---: | ----: |",
        "| a    |    5 |  1.5% |",
        "| 日本 | 1234 |       |",
    ]


@pytest.mark.parametrize(
    "args",
    [
        ["bench", "{}", "-p", "4", "-r", "1", "--detail"],
        ["run", "{}", "--tokens", "1", "--top", "3"],
        ["inspect", "{}", "--tensors"],
        ["inspect", "{}"],
    ],
    ids=lambda args: " ".join(args[::3]),
)
def test_tables_fit_a_terminal(args, tmp_path):
    """And show nothing of a file's texts that a terminal would obey."""
    path = tmp_path / "m.gguf"
    raw = EXAMPLE.read_bytes()
    at = raw.index(b"general.name") + len("general.name") + 4
    length = int.from_bytes(raw[at : at + 8], "little")
    name = ("\x1b]0;x\x07\u202e" + "long " * 99).encode()
    name = name[:length].decode(errors="ignore").encode().ljust(length)
    path.write_bytes(raw[: at + 8] + name + raw[at + 8 + length :])
    quiet = [] if args[0] == "inspect" else ["-q"]
    status, shown = in_a_terminal(*[arg.format(path) for arg in args], *quiet, KQPREFILL_BACKEND="cpu")
    assert status == 0 and "\x1b" not in shown and "\u202e" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert all(columns_of(line) <= 80 for line in rows) and (rows or args == ["inspect", "{}"])


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "qwen3-32b:Q4_K_M", "--vram", "8G", "-p", "8192"],
        ["plan", "qwen3-32b:Q4_K_M", "--backend", "cpu"],
        ["doctor"],
        ["inspect", "qwen3-30b-a3b:Q4_K_M"],
        ["inspect", "gpt-oss-20b:MXFP4_MOE", "--tensors"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_a_terminal_of_80_columns_wraps_nothing(args):
    """Words are wrapped by us, between words; a pipe gets each line whole."""
    _, shown = in_a_terminal(*args, COLUMNS="80", KQPREFILL_CACHE_DIR="/nowhere", CUDA_VISIBLE_DEVICES="")
    assert all(columns_of(line) <= 80 for line in shown.splitlines()), shown
    if "--vram" in args:
        bound = next(line for line in kq(*args).stdout.decode().splitlines() if line.startswith("bound by"))
        assert columns_of(bound) > 80 and bound.endswith("streamed for each prompt)")


def test_texts_that_begin_with_a_digit_are_no_numbers(monkeypatch):
    """They stand to the left, and are what is cut where a terminal is too narrow."""
    import sys

    types = ", ".join(f"{n} Q{n}_K" for n in range(1, 20))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    _, rule, line = table(["types", "size", "shape"], [[types, "1.50 GiB", "64 x 32"]]).splitlines()
    assert rule.split("|")[2].endswith(": ") and rule.count(":") == 1
    assert columns_of(line) == 80 and "…" in line and "1.50 GiB" in line


def test_a_table_is_cut_to_the_terminal(monkeypatch):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    drawn = table(["name", "n", "text"], [["x" * 90, "12345", "y\x1b\n" * 30], ["short", "1", "z"]])
    assert {columns_of(line) for line in drawn.splitlines()} == {60}
    assert "…" in drawn and "12345" in drawn and "\x1b" not in drawn and drawn.count("\n") == 3


def test_results_on_a_terminal_move_no_cursor():
    master, terminal = pty.openpty()
    record = {"tokens": [1, 2], "note": "\x1b[2J\u202e\x9b"}
    process = subprocess.Popen(
        [*ENTRY, "score", EXAMPLE, "--backend", "cpu"], stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.PIPE
    )
    os.close(terminal)
    process.stdin.write(lines([record]))
    process.stdin.close()
    data = b""
    while not data.endswith(b"\n"):
        data += os.read(master, 65536)
    process.wait()
    process.stderr.close()
    os.close(master)
    assert data.decode().strip().isprintable() and json.loads(data)["note"] == record["note"]
    assert read(score(stdin=lines([record])).stdout)[0]["note"] == record["note"]


def test_json_has_no_nan(tmp_path):
    """What cannot be said in JSON is an error, or null."""
    raw = bytearray(EXAMPLE.read_bytes())
    from kqprefill.gguf import GGUFFile

    with GGUFFile(EXAMPLE) as file:
        at = file.tensors["output_norm.weight"].offset
    for value in (np.nan, np.inf):
        raw[at : at + 4] = np.float32(value).tobytes()
        (tmp_path / "m.gguf").write_bytes(raw)
        for args in (["--json"], ["--top", 2], ["--top", 2, "--json"]):
            done = kq("run", tmp_path / "m.gguf", "--tokens", "1", "--backend", "cpu", *args)
            assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
        done = kq("score", tmp_path / "m.gguf", "--top", 2, "--backend", "cpu", stdin=b'{"tokens": [1, 2]}\n')
        assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
