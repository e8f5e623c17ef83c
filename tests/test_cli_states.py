"""kqprefill run --save-state and --load-state, from outside."""

import json
import os

import pytest

from conftest import EXAMPLE
from test_cli import kq

IDS = [72, 101, 108, 108, 111, 32, 119, 111]


def run(*args, tokens=None, **more):
    given = [] if tokens is None else ["--tokens", ",".join(map(str, tokens))]
    return kq("run", EXAMPLE, "--backend", "cpu", *given, *args, **more)


def refused(done, *words, status=1):
    said = done.stderr.decode()
    assert (done.returncode, done.stdout) == (status, b""), said
    assert all(word in said.splitlines()[-1] for word in words) and "Traceback" not in said, said


def answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("format", ["ggsq-4", "ggsn-10"])
def test_a_prompt_in_two_runs(format, tmp_path):
    state = tmp_path / "state"
    whole = answer(run("--json", tokens=IDS))
    first = run("--json", "--save-state", state, "--state-format", format, "--state-type", "f32", tokens=IDS[:5])
    assert answer(first)["prompt_tokens"] == 5 and answer(first)["timings"]["state"] >= 0
    assert answer(first)["token"] == answer(run("--json", tokens=IDS[:5]))["token"]
    second = answer(run("--json", "--load-state", state, tokens=IDS[5:]))
    assert second["token"] == whole["token"] and abs(second["logprob"] - whole["logprob"]) < 1e-4
    longer = run("--json", "--load-state", state, "--save-state", tmp_path / "more", tokens=IDS[5:7])
    assert answer(longer)["prompt_tokens"] == 2 + (format == "ggsn-10")
    third = answer(run("--json", "--load-state", tmp_path / "more", tokens=IDS[7:]))
    assert third["token"] == whole["token"] and abs(third["logprob"] - whole["logprob"]) < 1e-3


def test_a_text_that_goes_on_gets_no_bos(tmp_path):
    state = tmp_path / "state"
    answer(run("--json", "--save-state", state, "-p", "Hello"))
    assert answer(run("--json", "--load-state", state, "-p", " world"))["prompt_tokens"] == 6


def test_a_session_s_last_token_is_a_prompt(tmp_path):
    """A sequence's is not: its state holds no logits."""
    state = tmp_path / "state"
    saved = answer(run("--json", "--save-state", state, "--state-format", "ggsn-11", tokens=IDS))
    again = answer(run("--json", "--load-state", state, stdin=b""))
    assert again["token"] == saved["token"] and again["prompt_tokens"] == 1
    answer(run("--json", "--save-state", state, "--force", tokens=IDS))
    refused(run("--load-state", state, stdin=b""), str(state), "at least one token that follows", status=2)


def test_files_that_are_refused(tmp_path):
    state = tmp_path / "state"
    answer(run("--json", "--save-state", state, tokens=IDS))
    refused(run("--save-state", state, tokens=IDS), str(state), "--force", status=2)
    (tmp_path / "cut").write_bytes(state.read_bytes()[:-100])
    refused(run("--load-state", tmp_path / "cut", tokens=IDS), str(tmp_path / "cut"), "cut short")
    refused(run("--load-state", EXAMPLE, tokens=IDS), "no state file of llama.cpp")
    refused(run("--load-state", tmp_path / "none", tokens=IDS), str(tmp_path / "none"), "No such file")
    refused(run("--load-state", tmp_path, tokens=IDS), str(tmp_path), "Is a directory")
    refused(run("--load-state", state, "--save-state", state, "--force", tokens=IDS), "which is read", status=2)
    before = sorted(tmp_path.iterdir())
    refused(run("--save-state", tmp_path / "new", tokens=[99999]), "99999", status=2)
    refused(run("--save-state", tmp_path / "no" / "folder", tokens=IDS), "cannot be written")
    os.mkfifo(tmp_path / "pipe")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "pipe"])


@pytest.mark.parametrize(
    "args,words",
    [
        (["--state-type", "q8_0"], "--save-state FILE"),
        (["--state-hold-back"], "--save-state FILE"),
        (["--save-state", "x", "--state-type", "q4_0"], "--state-type q4_0"),
        (["--save-state", "x", "--state-type", "q8_0", "--state-transposed"], "q8_0"),
        (["--save-state", "x", "--state-format", "ggsq-1"], "ggsq-1"),
        (["--save-state", "-"], "names a file"),
        (["--load-state", "x", "--chat"], "--chat"),
        (["--save-state", "x", "--logits", "y.npy", "--all-positions"], "two runs"),
    ],
)
def test_wrong_usage(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["-p", "Hello"] if "--chat" in args else ["--tokens", "1,2"]
    done = kq("run", EXAMPLE, *args, *more)
    refused(done, words, status=2)
    assert not list(tmp_path.iterdir())
