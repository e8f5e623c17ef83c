"""What the package offers to Python, and the JSON that its commands print, which docs/json.md describes."""

import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.core import Batch, Ranks, brief
from test_cli import kq

CPU = ["--backend", "cpu"]


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def test_all_that_is_offered_is_there():
    for name in kqprefill.__all__:
        assert getattr(kqprefill, name) is not None
    assert set(kqprefill.__all__) <= set(dir(kqprefill))
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        _ = kqprefill.Modell
    names = {"Model", "Prefill", "Scored", "Item", "Cache", "Perplexity", "Stage", "perplexity"}
    assert names <= set(kqprefill.__all__)


def test_listing_the_package_is_light():
    code = "import sys, kqprefill; dir(kqprefill); print('numpy' in sys.modules, 'Model' in dir(kqprefill))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"False True\n"


def test_help_says_what_the_arguments_are():
    code = "import kqprefill; help(kqprefill.load)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name in ("path", "backend", "device", "kernels", "progress", "warn", "vram", "max_tokens", "precision"):
        assert re.search(rf"^ +{name}: ", shown, re.MULTILINE) and f"{name}: '" in shown.splitlines()[2]


def test_the_types_are_of_what_is_given(model):
    result = model.prefill([1, 2, 3])
    (scored,) = model.score([[1, 2, 3]])
    assert isinstance(model, kqprefill.Model) and isinstance(result, kqprefill.Prefill)
    assert isinstance(scored, kqprefill.Scored) and isinstance(model.item([1, 2]), kqprefill.Item)
    assert isinstance(model.new_cache(3), kqprefill.Cache)
    assert isinstance(kqprefill.perplexity(model, [1] * 16, 8), kqprefill.Perplexity)


def test_reprs_are_a_line(model, rng):
    tokens = rng.integers(0, 256, 300)
    result = model.prefill(tokens, logits="all", timed=True)
    assert "logits=float32 [300, 256]" in repr(result) and f"token={result.token}" in repr(result)
    scored, choices = model.score([tokens, {"tokens": [1], "choices": [[2], [3]]}], top=3)
    assert re.fullmatch(r"Scored\(n_tokens=299, logprob=-[\d.]+, perplexity=[\d.]+, top 3 of each\)", repr(scored))
    cache = model.new_cache(9)
    model.prefill([1, 2], cache=cache)
    assert repr(cache) == "<Cache: 2 tokens, room for 9>"
    batch = Batch(np.zeros(10_000, np.int32))
    ranks = Ranks(np.zeros(5000, np.float32), np.zeros((5000, 2), np.int32), np.zeros((5000, 2), np.float32))
    assert "int32 [10000]" in repr(batch) and "float32 [5000, 2]" in repr(ranks)
    for held in (result, scored, choices, model.item(tokens.tolist()), cache, batch, ranks, model):
        assert len(repr(held)) < 600 and "\n" not in repr(held) and "object at" not in repr(held)
    assert brief(list(range(9))) == "[0, 1, 2, 3, 4, 5, 6, 7, … (9)]"


def test_a_models_repr_says_what_and_where():
    model = kqprefill.load(EXAMPLE, backend="cpu")
    assert repr(model).startswith(f"<Model {EXAMPLE}: qwen3, 2 layers, vocabulary 256, context 4096, exact on cpu (")
    model.close()
    assert repr(model).endswith("closed>")


def test_tokens_per_second(model):
    result = model.prefill([1] * 20)
    assert result.tokens_per_second == pytest.approx(20 / result.timings["prefill"])
    assert model.prefill([]).tokens_per_second is None


def test_the_logger_hears_what_is_done(caplog):
    with caplog.at_level(logging.DEBUG, "kqprefill"), kqprefill.load(EXAMPLE, backend="cpu") as model:
        model.prefill([1, 2, 3])
    assert any("loaded in" in line and "cpu" in line for line in caplog.messages)
    assert any(line.startswith("3 tokens, ") and line.endswith("tokens/s") for line in caplog.messages)


def test_warnings_go_to_whoever_listens(caplog, capsys, monkeypatch):
    from kqprefill.backends.cuda import backend

    def unusable(*_):
        raise kqprefill.BackendError("no GPU here")

    monkeypatch.setattr(backend, "CudaBackend", unusable)
    kqprefill.load(EXAMPLE).close()
    assert "running on the CPU: no GPU here" in caplog.messages and capsys.readouterr().err == ""
    heard = []
    kqprefill.load(EXAMPLE, warn=heard.append).close()
    assert heard == ["running on the CPU: no GPU here"]
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    kqprefill.load(EXAMPLE).close()
    assert capsys.readouterr().err == "kqprefill: running on the CPU: no GPU here\n"


# docs/json.md ------------------------------------------------------------------------------------------------------


def documented():
    """{command: (keys that are always there, keys that may be)}, from the tables."""
    found = {}
    for section in (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, *rows = section.splitlines()
        cells = [row.split("|")[1] for row in rows if row.startswith("| ") and "`" in row.split("|")[1]]
        sometimes = {key for cell in cells for key in re.findall(r"\*`(\w+)`\*", cell)}
        found[title] = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)} - sometimes, sometimes
    return found


JSON_LINES = "score", "embed", "rerank"
RECORDS = b'{"prompt": "Hello"}\n{"prompt": "Hello", "choices": [" a", " b"]}\n{"prompt": ""}\n'
OUTPUTS = [
    ("run --json", ["run", EXAMPLE, "-p", "Hi", "--top", "2", "--json", *CPU], None),
    ("run --json", ["run", EXAMPLE, "-p", "Hi", "--json", *CPU], None),
    ("run --top", ["run", EXAMPLE, "-p", "Hi", "--top", "2", *CPU], None),
    ("score", ["score", EXAMPLE, "--per-token", "--greedy", "--top", "2", "--on-error", "skip", *CPU], RECORDS),
    ("embed", ["embed", EXAMPLE, "--text", "--pooling", "last", *CPU], b"Hello\n"),
    ("rerank", ["rerank", EXAMPLE, "--text", "-p", "q", "--answers", "y,n", *CPU], b"Hello\n"),
    ("rerank", ["rerank", EXAMPLE, "--text", "-p", "q", "--answers", "y,n", "--top", "1", *CPU], b"Hello\n"),
    ("perplexity --json", ["perplexity", EXAMPLE, "-c", "8", "--json", *CPU], b"1234567890" * 3),
    (
        "imatrix --json",
        ["imatrix", EXAMPLE, "--tokens", "1,2,3,4", "-c", "2", "-o", "/dev/null", "--json", "--show-statistics", *CPU],
        None,
    ),
    ("kld --json", ["kld", EXAMPLE, "--against", EXAMPLE, "-c", "8", "--json", *CPU], b"1234567890" * 3),
    ("bench -o json", ["bench", EXAMPLE, "-p", "4", "-r", "1", "--detail", "-o", "json", *CPU], None),
    ("bench -o json", ["bench", EXAMPLE, "-p", "4", "-r", "1", "-o", "json", *CPU], None),
    ("plan --json", ["plan", EXAMPLE, "--backend", "cpu", "--json"], None),
    ("plan --json", ["plan", "qwen3-32b:Q4_K_M", "--vram", "8G", "--json"], None),
    ("plan --json", ["plan", EXAMPLE, "--vram", "8G", "--json"], None),
    ("inspect --json", ["inspect", EXAMPLE, "--json"], None),
    ("tokenize --json", ["tokenize", EXAMPLE, "Hi", "--json"], None),
    ("tokenize --json", ["tokenize", EXAMPLE, "--decode", "72,105", "--json"], None),
    (
        "plan --device 0,1 --json",
        ["plan", "qwen3-8b:Q4_K_M", "--device", "0,1", "--vram", "8G", "--json"],
        None,
    ),
    ("doctor --json", ["doctor", "--json"], None),
    ("cache --json", ["cache", "--json"], None),
]


@pytest.mark.parametrize("title,command,stdin", OUTPUTS)
def test_outputs_are_as_documented(title, command, stdin):
    always, sometimes = documented()[f"kqprefill {title}"]
    printed = kq(*command, stdin=stdin).stdout
    objects = [json.loads(line) for line in printed.splitlines()] if title in JSON_LINES else json.loads(printed)
    version = isinstance(objects, dict)
    for described in [objects] if version else objects:
        assert always <= described.keys() <= always | sometimes
        assert ("version" in described) == version and described.get("version", 1) == 1
        for choice in described.get("choices", ()):
            assert choice.keys() <= sometimes


def test_every_documented_output_is_tested():
    of_folders = "kqprefill score -o FOLDER/"  # in test_cli_folder.py
    assert {f"kqprefill {title}" for title, *_ in OUTPUTS} | {of_folders} == documented().keys()
