"""kqprefill inspect."""

from dataclasses import replace
import json

import numpy as np

from conftest import EXAMPLE, ROOT
from kqprefill.gguf import GGUFFile
from kqprefill.synthetic import SyntheticFile, write_gguf
from test_cli import TOKENS, kq


def test_inspect():
    described = json.loads(kq("inspect", EXAMPLE, "--json").stdout)
    with GGUFFile(EXAMPLE) as file:
        tensors, name = list(file.tensors.values()), file.metadata["general.name"]
    assert described["bytes"] == sum(t.nbytes for t in tensors) == sum(g["bytes"] for g in described["groups"].values())
    assert described["parameters"] == sum(int(np.prod(t.shape)) for t in tensors)
    assert (described["architecture"], described["layers"], described["backends"]) == ("qwen3", 2, ["cpu", "cuda"])
    assert described["groups"]["attention"]["tensors"] == 8 and described["groups"]["norms and biases"]["types"] == {
        "F32": 9
    }
    text = kq("inspect", EXAMPLE).stdout.decode()
    assert "architecture qwen3, 1.31 M parameters in" in text
    assert " 671.03 B parameters in" in kq("inspect", "deepseek-v3:Q4_K_M").stdout.decode()
    assert name in text and "kqprefill runs it (cpu, cuda)" in text and "feed-forward" in text
    assert len(json.loads(kq("inspect", EXAMPLE, "--tensors", "--json").stdout)) == len(tensors)
    assert kq("inspect", EXAMPLE, "--tensors").stdout.count(b"\n") == len(tensors) + 2
    assert kq("inspect", EXAMPLE, "--metadata", "general.architecture").stdout == b"qwen3\n"
    assert b"qwen3.block_count = 2\n" in kq("inspect", EXAMPLE, "--metadata").stdout
    assert kq("inspect", EXAMPLE, "--metadata", "no.such.key").returncode == 2


def test_inspect_names_what_is_left_in_the_file():
    """A head that drafts further tokens: a whole block more, which prefill does not read."""
    path = ROOT / "tests/data/qwen35-tied-nextn.gguf"
    described = json.loads(kq("inspect", path, "--json").stdout)
    with GGUFFile(path) as file:
        assert described["left"] == [name for name in file.tensors if name.startswith("blk.2.")]
    assert described["groups"]["left in the file"]["tensors"] == len(described["left"]) == 15
    assert "recurrence" in described["groups"] and described["layers"] == 2
    said = kq("inspect", path).stdout.splitlines()
    assert said[-1] == b"left in the file: blk.2 (15 tensors), which draft further tokens"


def test_what_sees_stays_in_the_file(tmp_path):
    """Ollama's files have it beside the language model. By itself it is none."""
    model = SyntheticFile.named("tiny")
    for name in ("v.blk.0.attn_q.weight", "v.patch_embd.weight", "mm.0.weight"):
        model.tensors[name] = replace(model.tensors["blk.0.attn_q.weight"], name=name)
    write_gguf(model, tmp_path / "sees.gguf")
    done = kq("run", tmp_path / "sees.gguf", "--backend", "cpu", "--tokens", TOKENS)
    assert done.stdout == kq("run", EXAMPLE, "--backend", "cpu", "--tokens", TOKENS).stdout != b""
    said = kq("inspect", tmp_path / "sees.gguf").stdout.splitlines()
    assert said[-2:] == [
        b"left in the file: v.* (2 tensors), which see or hear",
        b"left in the file: mm.* (1 tensor), which see or hear",
    ]
    model.metadata["general.architecture"] = "clip"
    write_gguf(model, tmp_path / "tower.gguf")
    done = kq("run", tmp_path / "tower.gguf", "--backend", "cpu", "--tokens", TOKENS)
    assert done.returncode != 0 and b"only what sees or hears (mmproj); give the language model's own" in done.stderr


def test_inspect_says_what_does_not_run(tmp_path):
    raw = EXAMPLE.read_bytes().replace(b"qwen3", b"qwenX")
    (tmp_path / "model.gguf").write_bytes(raw)
    done = kq("inspect", tmp_path / "model.gguf")
    assert (
        done.returncode == 0
        and b"kqprefill does not run it" in done.stdout
        and b"'qwenX' is not supported" in done.stdout
    )
