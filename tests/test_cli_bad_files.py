"""Files that cannot be used: every command that reads one ends with status 1 and one line, whichever file it is."""

from importlib.util import find_spec

import pytest

from conftest import EXAMPLE
from kqprefill.cli import common, records
from kqprefill.cli.commands import cli
from test_cli_input import answer

CPU = ["--backend", "cpu"]
WINDOWS = ["-c", "64", *CPU]
RERANK = ["-p", "q", "--answers", "y,n", *CPU]

MODELS = {  # {}: the model; LINES and TEXT: files that are well
    "run": ["{}", "--tokens", "1,2", *CPU],
    "score": ["{}", "LINES", *CPU],
    "perplexity": ["{}", "--tokens", "1,2,3,4", *WINDOWS],
    "kld": ["{}", "--against", EXAMPLE, "-f", "TEXT", *WINDOWS],
    "lm-eval": ["--model_args", "path={},backend=cpu", "--include_path", "TASKS", "--tasks", "kq_choices"],
    "embed": ["{}", "LINES", "--pooling", "last", *CPU],
    "rerank": ["{}", "LINES", *RERANK],
    "imatrix": ["{}", "-f", "TEXT", "-o", "OUT", *WINDOWS],
    "serve": ["{}", "--port", "0", *CPU],
    "bench": ["{}", "-p", "4", *CPU],
    "plan": ["{}", "--vram", "8G"],
    "inspect": ["{}"],
    "tokenize": ["{}", "Hello"],
}
OTHERS = {  # {}: the file
    "run, a text": ["run", EXAMPLE, "-f", "{}", *CPU],
    "run, a prompt": ["run", EXAMPLE, "-p", "@{}", *CPU],
    "run, ids": ["run", EXAMPLE, "--tokens", "@{}", *CPU],
    "run, a state": ["run", EXAMPLE, "--tokens", "1", "--load-state", "{}", *CPU],
    "run, a template": ["run", EXAMPLE, "-p", "x", "--chat", "--chat-template", "{}", *CPU],
    "score, lines": ["score", EXAMPLE, "{}", *CPU],
    "score, a template": ["score", EXAMPLE, "LINES", "--chat-template", "{}", *CPU],
    "perplexity, a text": ["perplexity", EXAMPLE, "-f", "{}", *WINDOWS],
    "perplexity, ids": ["perplexity", EXAMPLE, "--tokens", "@{}", *WINDOWS],
    "kld, a text": ["kld", EXAMPLE, "--against", EXAMPLE, "-f", "{}", *WINDOWS],
    "kld, the other model": ["kld", EXAMPLE, "--against", "{}", "-f", "TEXT", *WINDOWS],
    "kld, logits": ["kld", EXAMPLE, "--base", "{}", *CPU],
    "embed, lines": ["embed", EXAMPLE, "{}", "--pooling", "last", *CPU],
    "rerank, lines": ["rerank", EXAMPLE, "{}", *RERANK],
    "rerank, a query": ["rerank", EXAMPLE, "LINES", "-p", "@{}", "--answers", "y,n", *CPU],
    "imatrix, a text": ["imatrix", EXAMPLE, "-f", "{}", "-o", "OUT", *WINDOWS],
    "imatrix, a matrix": ["imatrix", "--in-file", "{}", "--show-statistics"],
    "serve, a key": ["serve", EXAMPLE, "--port", "0", "--api-key", "@{}", *CPU],
    "tokenize, a text": ["tokenize", EXAMPLE, "-f", "{}"],
    "tokenize, TEXT": ["tokenize", EXAMPLE, "@{}"],
    "tokenize, ids": ["tokenize", EXAMPLE, "--decode", "@{}"],
}
EMPTY_TEXT = "tokenize, a text", "tokenize, TEXT"  # which has no tokens, and that is no error
NEEDS = {"lm-eval": "lm_eval", "serve": "uvicorn"}


@pytest.fixture
def said(tmp_path, monkeypatch, capfd):
    """said(kind, args): the exit status and stderr of a command whose {} is a file of that kind."""
    for name in ("OUT", "absent"):
        assert not (tmp_path / name).exists()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "damaged").write_bytes(EXAMPLE.read_bytes()[:100_000])
    (tmp_path / "LINES").write_text('{"prompt": "Hello", "text": "Hello"}\n')
    (tmp_path / "TEXT").write_text("Hello. " * 100)
    monkeypatch.chdir(tmp_path)

    def run(kind, args):
        status = answer(*(str(arg).replace("{}", kind) for arg in args))
        out, err = capfd.readouterr()
        assert out == "", out
        return status, err

    return run


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "damaged"])
@pytest.mark.parametrize("command", MODELS)
def test_models(said, command, kind, tmp_path):
    needed = NEEDS.get(command)
    if needed and find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    if command == "lm-eval":
        from test_lm_eval import write_tasks

        (tmp_path / "TASKS").mkdir()
        write_tasks(tmp_path / "TASKS", 4)
    status, err = said(kind, [command, *MODELS[command]])
    lines = err.splitlines()
    if command == "lm-eval":
        lines = lines[-1:]  # the harness has words of its own
    assert status == 1 and len(lines) == 1 and lines[0].startswith(f"kqprefill: {kind}: "), err


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "damaged"])
@pytest.mark.parametrize("what", OTHERS)
def test_other_files(said, what, kind):
    if what.startswith("serve") and find_spec("uvicorn") is None:
        pytest.skip("needs uvicorn")
    if kind == "empty" and what in EMPTY_TEXT:
        return
    status, err = said(kind, OTHERS[what])
    assert status == 1 and err.count("\n") == 1 and err.startswith("kqprefill: ") and kind in err, err


def test_no_command_is_left_out():
    reading_none = {"doctor", "cache", "completion", "synth"}
    assert set(MODELS) | reading_none == set(cli.commands)
    assert {what.partition(",")[0] for what in OTHERS} <= set(MODELS)


def test_wrong_usage_has_another_status(said):
    assert said("absent", ["run", EXAMPLE, "--no-such-option"])[0] == 2
    assert said("absent", ["inspect"])[0] == 2
    assert said("absent", ["run", EXAMPLE, "--tokens", "1", "-p", "x"])[0] == 2
    assert said("absent", ["run", EXAMPLE, "--tokens", "one"])[0] == 2  # in the command, not in a file


@pytest.mark.parametrize("what", [what for what in OTHERS if what.endswith((" a text", " ids", " lines", " a key"))])
def test_a_file_without_an_end(said, what, monkeypatch):
    if what.startswith("serve") and find_spec("uvicorn") is None:
        pytest.skip("needs uvicorn")
    monkeypatch.setattr(common, "LARGEST_TEXT", 1 << 20)
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 20)
    status, err = said("/dev/zero", OTHERS[what])
    words = "line 1 is longer than 1 MiB" if what.endswith("lines") else "a text of more than 1 MiB; give a part of it"
    assert status == 1 and err.count("\n") == 1 and f"/dev/zero: {words}" in err, err


def test_a_large_file_is_not_read(said, tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate((1 << 30) + 1)
    status, err = said("large", OTHERS["perplexity, a text"])
    assert status == 1 and err == "kqprefill: --file large: a text of more than 1.00 GiB; give a part of it (head -c)\n"
