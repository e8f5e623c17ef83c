"""The command line among other tools: examples as written, completion, environment, terminals, arrays, faults."""

from importlib.util import find_spec
import json
import os
from pathlib import Path
import pty
import re
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
from kqprefill.cli.commands import cli
from test_cli import COMMAND, ENTRY, TOKENS, kq

COMMANDS = ["", *sorted(cli.commands)]
needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")


@pytest.fixture
def tree(tmp_path):
    """(folder, environment) as a user has them in a checkout, with `kqprefill` on the path and the CPU chosen."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "kqprefill"
    command.write_text('#!/bin/sh\nexec {} "$@"\n'.format(" ".join(f"'{word}'" for word in ENTRY)))
    command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {
        "PATH": path,
        "HOME": str(tmp_path),
        "KQPREFILL_BACKEND": "cpu",
        "KQPREFILL_CACHE_DIR": str(tmp_path / "cache"),
    }
    return tmp_path, {**os.environ, **own}


def shell(tree, line, **kwargs):
    return subprocess.run(["bash", "-c", line], cwd=tree[0], env=tree[1], capture_output=True, timeout=120, **kwargs)


def help_of(name):
    return kq(*([name] if name else []), "--help").stdout.decode()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "serve"])  # which runs on: tests/test_serve.py
def test_the_help_shows_examples_that_work(tree, name):
    text = help_of(name)
    names = name or "|".join(COMMANDS[1:])
    if name == "lm-eval" and find_spec("lm_eval") is None:
        pytest.skip("its example needs pip install '.[lm-eval]'")
    examples = re.findall(rf"^ +((?:echo .*\| )?kqprefill (?:{names})\b.*)$", text.split("Options:")[0], re.MULTILINE)
    assert examples, text
    for line in examples:
        done = shell(tree, line)
        no_gpu = name == "doctor" and done.returncode == 1
        assert done.returncode == 0 or no_gpu, f"{line}\n{done.stderr.decode()}"
        assert done.stdout or ">" in line or " -o " in line or name == "synth"


def test_every_option_and_command_says_what_it_is():
    for name, command in cli.commands.items():
        assert command.help, name
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert option.help or option.show_default, f"{name} {option.name}"


def test_what_a_cluster_sets_is_in_the_environment(tree):
    _folder, environment = tree
    environment |= {
        "KQPREFILL_BATCH_TOKENS": "30",
        "KQPREFILL_ON_ERROR": "skip",
        "KQPREFILL_QUIET": "1",
        "KQPREFILL_VRAM": "8G",
    }
    done = shell(tree, "kqprefill score examples/tiny-qwen3.gguf", input=b'{"tokens": [1, 2]}\nx\n')
    assert done.returncode == 3 and done.stdout.count(b"\n") == 2 and done.stderr == b""
    environment["KQPREFILL_BACKEND"] = "nonsense"
    assert shell(tree, "kqprefill run examples/tiny-qwen3.gguf --tokens 1").returncode == 2
    for name in ("run", "score", "perplexity", "bench"):
        text = " ".join(help_of(name).split())
        assert all(f"KQPREFILL_{option}" in text for option in ("BACKEND", "DEVICE", "KERNELS", "VRAM", "QUIET")), name


@pytest.mark.skipif(not COMMAND.exists(), reason="needs the installed command, by whose name click completes")
def test_completion_completes(tree):
    script = shell(tree, "kqprefill completion bash").stdout.decode()
    assert "complete" in script
    done = shell(
        tree,
        script + "\nCOMP_WORDS=(kqprefill sc); COMP_CWORD=1; _kqprefill_completion kqprefill; echo ${COMPREPLY[@]}",
    )
    assert done.stdout.decode().split() == ["score"], done.stderr
    for name in ("zsh", "fish"):
        assert b"_KQPREFILL_COMPLETE" in shell(tree, f"kqprefill completion {name}").stdout


def in_a_terminal(*args, **environment):
    """(status, what a command prints) where stdout and stderr are a terminal."""
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [*ENTRY, *map(str, args)], stdout=terminal, stderr=terminal, env={**os.environ, **environment}
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while data := os.read(master, 65536):
                shown += data
        except OSError:  # the other end has closed
            pass
    os.close(master)
    return process.returncode, shown.decode()


def test_the_likeliest_tokens():
    status, shown = in_a_terminal("run", EXAMPLE, "--tokens", TOKENS, "--top", 3, "--backend", "cpu", "-q")
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert status == 0 and len(table) == 5 and "%" in table[2]
    piped = json.loads(kq("run", EXAMPLE, "--tokens", TOKENS, "--top", 3, "--backend", "cpu").stdout)
    assert [t["probability"] for t in piped] == sorted((t["probability"] for t in piped), reverse=True)
    assert [str(t["token"]) for t in piped] == [line.split("|")[3].strip() for line in table[2:]]
    whole = json.loads(kq("run", EXAMPLE, "--tokens", TOKENS, "--top", 3, "--json", "--backend", "cpu").stdout)
    assert (
        whole["top"] == piped
        and piped[0]["token"] == whole["token"]
        and piped[0]["logprob"] == pytest.approx(whole["logprob"], abs=1e-6)
    )
    assert kq("run", EXAMPLE, "--tokens", TOKENS, "--top", 999, "--backend", "cpu").returncode == 2


def test_windows_is_told_in_a_line():
    code = (
        "import sys, click; sys.platform, sys.modules['fcntl'], sys.argv = 'win32', None, ['kqprefill', 'doctor']\n"
        "from kqprefill.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "WSL2" in done.stderr


def test_no_color():
    """Bars move the cursor; with NO_COLOR nothing is coloured."""
    colour = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")
    plain = {"TERM": "xterm-256color", "KQPREFILL_QUIET": ""}
    assert colour.search(in_a_terminal("run", EXAMPLE, "--tokens", TOKENS, "--backend", "cpu", **plain)[1])
    assert not colour.search(
        in_a_terminal("run", EXAMPLE, "--tokens", TOKENS, "--backend", "cpu", NO_COLOR="1", **plain)[1]
    )


def test_arrays_that_other_tools_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    found = []
    for name in ("a.npy", "a.npz", "a.safetensors"):
        done = kq(
            "run", EXAMPLE, "--tokens", TOKENS, "--logits", tmp_path / name, "--all-positions", "--backend", "cpu"
        )
        assert done.returncode == 0
        found.append(safetensors.load_file(tmp_path / name) if "safe" in name else np.load(tmp_path / name))
    plain, *named = found
    for arrays in named:
        assert np.array_equal(arrays["logits"], plain) and arrays["tokens"].tolist() == [
            int(t) for t in TOKENS.split(",")
        ]


@pytest.mark.parametrize("kind,magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot(tmp_path, kind, magic):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"speed.{kind}"
    done = kq("bench", EXAMPLE, "-p", "8,32", "-r", 2, "--plot", picture, "--backend", "cpu")
    assert done.returncode == 0 and picture.read_bytes().startswith(magic)


def test_the_plot_shows_the_floors(tmp_path):
    pytest.importorskip("matplotlib")
    from kqprefill.backends.cuda.bounds import H100, floors
    from kqprefill.backends.cuda.kernel_set import kernel_set_of
    from kqprefill.backends.cuda.rehearsal import plan_model
    from kqprefill.cli.plot import check_plot, draw
    from kqprefill.errors import InputError
    from kqprefill.models import read_model
    from kqprefill.synthetic import SyntheticFile

    family = read_model(SyntheticFile.named("qwen3-32b:Q4_K_M"))
    rows = [
        {"prompt_tokens": n, "tokens_per_second": 1e3 * n, "tokens_per_second_stddev": 1.0, "model": "m", "device": "d"}
        for n in (1, 64)
    ]
    for budget, words in (
        (80 << 30, "reading each weight once: 3.35 TB/s"),
        (8 << 30, "streamed weights over the bus: 55 GB/s"),
    ):
        kind = check_plot(str(tmp_path / "x.svg"))
        with open(tmp_path / "x.svg", "wb") as file:
            plan = plan_model(family, H100, kernel_set_of(H100.capability), budget, 2048)
            made = floors(plan, family, H100)
            draw(rows, made, file, kind)
        text = (tmp_path / "x.svg").read_text(encoding="utf-8")
        assert words in text and "arithmetic: 1071 TFLOP/s" in text
        assert all(0 < seconds(512) <= seconds(8192) for _, seconds in made)
    with pytest.raises(InputError, match="ends in"):
        check_plot("speed.txt")


# examples/ -----------------------------------------------------------------------------------------------------------


@needs_jq
def test_choosing_with_jq(tree):
    done = shell(tree, "examples/choose.sh examples/tiny-qwen3.gguf")
    *questions, summary = map(json.loads, done.stdout.splitlines())
    assert [q["id"] for q in questions] == ["italy", "water", "days"]
    assert summary == {"questions": 3, "accuracy": sum(q["right"] for q in questions) / 3}


@needs_jq
def test_filtering_by_perplexity(tree):
    texts = [json.loads(line) for line in (ROOT / "examples/texts.jsonl").read_text().splitlines()]
    kept = {}
    for bound in ("1e9", "0.5"):
        done = shell(tree, f"examples/filter.sh examples/tiny-qwen3.gguf {bound} < examples/texts.jsonl")
        assert done.returncode == 0, done.stderr
        kept[bound] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(k["id"], k["text"]) for k in kept["1e9"]] == [(t["id"], t["prompt"]) for t in texts] and kept["0.5"] == []


def test_distilling(tree):
    done = shell(tree, "python examples/distil.py examples/tiny-qwen3.gguf examples/texts.jsonl teacher.npz 7")
    assert done.returncode == 0, done.stderr
    with np.load(tree[0] / "teacher.npz") as arrays:
        places = len(arrays["tokens"]) - len(arrays["starts"])
        assert arrays["top_tokens"].shape == arrays["top_logprobs"].shape == (places, 7) and len(arrays["starts"]) == 4


def test_the_api_in_a_page(tree):
    done = shell(tree, "python examples/api.py")
    assert done.returncode == 0 and done.stdout.decode().splitlines()[-1].startswith("in pieces: "), done.stderr


# Faults --------------------------------------------------------------------------------------------------------------

COMPILE = """
import sys
from kqprefill.backends.cuda.device.compiler import KernelCache, Program, Target
code, hit = KernelCache().get(Program("scales.cu"), Target("cubin", "sm_80"))
print(code[:4] == b"\\x7fELF", hit)
"""


def compile_in(folder, before=""):
    done = subprocess.run(
        [sys.executable, "-c", before + COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "KQPREFILL_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_full_disk_costs_only_the_cache(tmp_path):
    """Entries that cannot be written whole are not there at all."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    assert compile_in(tmp_path / "cache", limit) == ["True", "False"]
    assert list((tmp_path / "cache").iterdir()) == []
    assert compile_in(tmp_path / "cache") == ["True", "False"] and compile_in(tmp_path / "cache") == ["True", "True"]


def test_a_read_only_home_costs_only_the_cache(tmp_path):
    """Root may write anywhere, so that the refusal is made here."""
    refuse = """
import pathlib
def mkdir(*_, **__): raise PermissionError(30, 'Read-only file system')
pathlib.Path.mkdir = mkdir
"""
    assert compile_in(tmp_path / "cache", refuse) == ["True", "False"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give a folder away")
def test_a_cache_that_is_another_users_is_not_believed(tmp_path):
    assert compile_in(tmp_path / "cache") == ["True", "False"]
    os.chown(tmp_path / "cache", 12345, 12345)
    assert compile_in(tmp_path / "cache") == ["True", "False"]


def test_nothing_is_fetched():
    """No command opens a socket."""
    code = """
import socket, sys
def no(*_, **__): sys.exit('a socket')
socket.socket = no
from kqprefill.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "score", EXAMPLE, "--backend", "cpu"],
        input=b'{"prompt": "Hello"}\n',
        capture_output=True,
    )
    assert done.returncode == 0 and b"logprob" in done.stdout, done.stderr


def test_nothing_in_a_file_is_run():
    """No pickle; and a model's chat template only in Jinja's sandbox, in a process that has nothing of the package."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "kqprefill").rglob("*.py")}
    assert not re.search(r"pickle|\beval\(|\bexec\(", "".join(sources.values()))
    jinja = [path.name for path, source in sources.items() if re.search(r"(import|from) jinja2", source)]
    renderer = sources[ROOT / "kqprefill/text/render.py"]
    assert jinja == ["render.py"] and "ImmutableSandboxedEnvironment" in renderer
    assert not re.search(r"from \.|kqprefill", renderer)
