"""Models by their names in the stores of Hugging Face's library and of Ollama, made here as those lay them out."""

import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess

import pytest

from conftest import EXAMPLE
from kqprefill.cli.sources import model_path
from kqprefill.errors import KqprefillError
from test_cli import ENTRY, TOKENS, run

VARIABLES = "HF_HUB_CACHE HF_HOME XDG_CACHE_HOME OLLAMA_MODELS".split()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, and none of the variables that lead elsewhere."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hugging_face(hub, names, repo="owner/repo.v1-GGUF", commit="0123abcd", main=True):
    """A repository in huggingface_hub's cache with files of those names; its snapshot's folder."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for name in names:
        blob = folder / "blobs" / hashlib.sha256(f"{commit} {name}".encode()).hexdigest()
        shutil.copy(EXAMPLE, blob)
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return snapshot


MIXED = ["README.md", "m-Q4_K_M.gguf", "m-Q4_K.gguf", "m.Q8_0.gguf", "mmproj-F16.gguf", "imatrix.gguf"]


@pytest.mark.parametrize(
    "variables,hub",
    [
        ({}, ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "hf", "XDG_CACHE_HOME": "xdg"}, "hf/hub"),
        ({"HF_HUB_CACHE": "cache", "HF_HOME": "hf"}, "cache"),
        ({"HF_HUB_CACHE": "~/cache"}, "cache"),
    ],
    ids=range(5),
)
def test_where_hugging_face_keeps_them(home, monkeypatch, variables, hub):
    for name, value in variables.items():
        monkeypatch.setenv(name, value if value[0] == "~" else str(home / value))
    snapshot = hugging_face(home / hub, ["m.gguf"])
    assert model_path("hf:owner/repo.v1-GGUF") == str(snapshot / "m.gguf")
    with pytest.raises(KqprefillError) as absent:
        model_path("hf:owner/other")
    assert str(home / hub / "models--owner--other") in str(absent.value)


def test_which_file_of_a_repository(home):
    snapshot = hugging_face(home / ".cache/huggingface/hub", MIXED)
    name = "hf:owner/repo.v1-GGUF"
    assert model_path(name) == str(snapshot / "m-Q4_K_M.gguf")  # llama.cpp's choice
    assert model_path(f"{name}:q4_k") == str(snapshot / "m-Q4_K.gguf")
    assert model_path(f"{name}:Q8_0") == str(snapshot / "m.Q8_0.gguf")
    assert model_path(f"{name}:m-Q4_K.gguf") == str(snapshot / "m-Q4_K.gguf")
    with pytest.raises(KqprefillError, match=r"none is meant.*m-Q4_K\.gguf, m-Q4_K_M\.gguf, m\.Q8_0\.gguf"):
        model_path(f"{name}:Q5_K")
    (snapshot / "m-Q4_K_M.gguf").unlink()
    with pytest.raises(KqprefillError, match="name one"):
        model_path(name)


def test_a_split_model_is_its_first_file(home):
    parts = [f"Q4_K_M/big-Q4_K_M-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    snapshot = hugging_face(home / ".cache/huggingface/hub", [*parts, "Q8_0/big-Q8_0-00001-of-00002.gguf"])
    assert model_path("hf:owner/repo.v1-GGUF:Q4_K_M") == str(snapshot / parts[0])


def test_which_commit_of_a_repository(home):
    hub = home / ".cache/huggingface/hub"
    old = hugging_face(hub, ["m.gguf"], commit="aaaa", main=False)
    os.utime(old, (1, 1))
    new = hugging_face(hub, ["m.gguf"], commit="bbbb", main=False)
    assert model_path("hf:owner/repo.v1-GGUF") == str(new / "m.gguf")
    (old.parents[1] / "refs").mkdir()
    (old.parents[1] / "refs" / "main").write_text("aaaa\n")
    assert model_path("hf:owner/repo.v1-GGUF") == str(old / "m.gguf")
    (old.parents[1] / "refs" / "main").write_text("../../../../etc")
    assert model_path("hf:owner/repo.v1-GGUF") == str(new / "m.gguf")


def ollama(models, manifest, digest=None, layers=None):
    """A model in Ollama's folder; its blob."""
    digest = digest or "sha256:" + hashlib.sha256(b"model").hexdigest()
    blob = models / "blobs" / digest.replace(":", "-")
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLE, blob)
    if layers is None:
        layers = [
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "1" * 64},
            {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1},
        ]
    path = models / "manifests" / manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blob


@pytest.mark.parametrize(
    "name,manifest",
    [
        ("gemma3", "registry.ollama.ai/library/gemma3/latest"),
        ("gemma3:270m-it", "registry.ollama.ai/library/gemma3/270m-it"),
        ("someone/gemma3:1b", "registry.ollama.ai/someone/gemma3/1b"),
        ("hf.co/owner/repo:Q4_K_M", "hf.co/owner/repo/Q4_K_M"),
    ],
)
def test_ollamas_names(home, monkeypatch, name, manifest):
    blob = ollama(home / ".ollama/models", manifest)
    assert model_path(f"ollama:{name}") == str(blob)
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    with pytest.raises(KqprefillError) as absent:
        model_path(f"ollama:{name}")
    assert str(home / "elsewhere/manifests" / manifest) in str(absent.value)
    blob = ollama(home / "elsewhere", manifest)
    assert model_path(f"ollama:{name}") == str(blob)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        5,
        [{"mediaType": "application/vnd.ollama.image.model"}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../../etc/passwd"}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": 5}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "2" * 64}],
    ],
    ids=range(6),
)
def test_a_manifest_that_is_damaged(home, layers):
    ollama(home / ".ollama/models", "registry.ollama.ai/library/x/latest", layers=layers)
    with pytest.raises(KqprefillError, match="library/x/latest"):
        model_path("ollama:x")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:x", "hf:a/b/c", "hf:../b", "hf:a/..", "ollama:", "ollama:../../x", "ollama:a/b/c/d"]
)
def test_names_that_are_none(home, name):
    with pytest.raises(KqprefillError, match=r"^(hf|ollama):"):
        model_path(name)


def test_the_users_folder_and_files_that_are_called_so(home):
    assert model_path("~/m.gguf") == str(home / "m.gguf") and model_path("m.gguf") == "m.gguf"
    for name in ("hf:a", "~x"):
        Path(name).write_text("")
        assert model_path(name) == name


def test_every_command_takes_them(home):
    hugging_face(home / ".cache/huggingface/hub", ["m.gguf"])
    ollama(home / ".ollama/models", "registry.ollama.ai/library/tiny/latest")
    shutil.copy(EXAMPLE, home / "m.gguf")
    expected = run("--tokens", TOKENS).stdout
    commands = [
        ["run", "ollama:tiny", "--tokens", TOKENS],
        ["run", "~/m.gguf", "--prompt", "Hello"],
        ["tokenize", "hf:owner/repo.v1-GGUF", "Hello"],
        ["inspect", "ollama:tiny"],
        ["plan", "ollama:tiny", "--vram", "8G"],
        ["score", "hf:owner/repo.v1-GGUF"],
        ["bench", "ollama:tiny", "-p", "4", "-r", "1"],
        ["perplexity", "ollama:tiny", "-c", "4", "--tokens", TOKENS],
    ]
    environment = {**os.environ, "KQPREFILL_BACKEND": "cpu"}
    for command in commands:
        if command[0] == "plan":
            command += ["--backend", "auto"]
        done = subprocess.run([*ENTRY, *command], input=b'{"prompt": "Hi"}\n', capture_output=True, env=environment)
        assert done.returncode == 0 and done.stdout, (command, done.stderr)
        if command[0] == "run":
            assert done.stdout == expected
