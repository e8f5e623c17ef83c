"""The kernel cache: nothing that somebody else could have written is run; nothing but its own is removed."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from conftest import ROOT
from kqprefill.backends.cuda.device import compiler
from kqprefill.backends.cuda.device.compiler import KernelCache, Program, Target

SCALES, NORM = Program("scales.cu"), Program("norm.cu")
TARGET = Target("cubin", "sm_80")


@pytest.fixture
def compiled(monkeypatch):
    """Programs that are "compiled", in order; their code is their name."""
    programs = []

    def compile_program(program, target, logs=None):
        programs.append(program.source)
        return program.source.encode()

    monkeypatch.setattr(compiler, "compile_program", compile_program)
    return programs


def entry_of(folder, program=SCALES):
    """The path of a program's entry, written."""
    before = set(folder.iterdir()) if folder.exists() else set()
    KernelCache(folder).get(program, TARGET)
    (entry,) = set(folder.iterdir()) - before
    return entry


def a_link(entry):
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


def a_pipe(entry):
    entry.unlink()
    os.mkfifo(entry, 0o600)


def of_another(entry):
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(entry, 12345, 12345)


PLANTED = {
    "group-writable": lambda entry: entry.chmod(0o620),
    "world-writable": lambda entry: entry.chmod(0o602),
    "a link": a_link,
    "a pipe": a_pipe,
    "another's": of_another,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_an_entry_that_another_could_have_written_is_compiled_again(planted, compiled, tmp_path):
    """As doctor's advice is followed: others could write the folder, and now they cannot."""
    entry = entry_of(tmp_path / "cache")
    PLANTED[planted](entry)
    assert KernelCache(tmp_path / "cache").get(SCALES, TARGET) == (b"scales.cu", False)
    assert KernelCache(tmp_path / "cache").get(SCALES, TARGET) == (b"scales.cu", True)
    assert compiled == ["scales.cu"] * 2 and entry.is_file() and not entry.is_symlink()


def test_an_entry_under_another_name_is_not_its_program(compiled, tmp_path):
    """Whoever may rename in a folder could give a kernel another's code, each sound in itself."""
    scales, norm = entry_of(tmp_path), entry_of(tmp_path, NORM)
    scales.replace(norm)
    assert KernelCache(tmp_path).get(NORM, TARGET) == (b"norm.cu", False)


def test_an_entry_of_version_0_1_is_not_believed(compiled, tmp_path):
    """It carried only its code's digest."""
    import hashlib

    entry = entry_of(tmp_path)
    entry.write_bytes(hashlib.sha256(b"planted").digest() + b"planted")
    assert KernelCache(tmp_path).get(SCALES, TARGET) == (b"scales.cu", False)


def test_a_parent_that_others_may_write(compiled, tmp_path):
    """They could put another folder in the cache's place; not so where the sticky bit keeps them from it."""
    parent = tmp_path / "parent"
    entry_of(parent / "cache")
    for mode, why in ((0o777, str(parent)), (0o1777, None), (0o755, None)):
        parent.chmod(mode)
        cache = KernelCache(parent / "cache")
        assert (why is None and cache.why_off() is None) or f"what is in {why}: chmod go-w" in cache.why_off()
        assert cache.get(SCALES, TARGET)[1] == (why is None)
        assert (KernelCache(parent / "new").why_off() is None) == (why is None)


def test_advice_is_to_clear_first(compiled, tmp_path):
    entry_of(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    why = KernelCache(tmp_path / "cache").why_off()
    assert why.index("kqprefill cache --clear") < why.index("chmod go-w")
    assert KernelCache(tmp_path / "cache").clear()[0] == 1 and not list((tmp_path / "cache").iterdir())


def test_only_what_the_cache_wrote_is_removed(compiled, tmp_path):
    entry = entry_of(tmp_path)
    (tmp_path / ".kqprefill-abc123.tmp").write_bytes(b"of a process that was killed")
    kept = {
        "f" * 64 + ".cubin": b"of a program that names its files so, too",
        "e" * 64 + ".ptx": b"",
        "tmpabc.tmp": b"somebody's",
        "mine.txt": b"",
        entry.name + ".bak": entry.read_bytes(),
    }
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ("d" * 64 + ".cubin")).symlink_to("mine.txt")
    (tmp_path / ("c" * 64 + ".cubin")).mkdir()
    assert KernelCache(tmp_path).clear()[0] == 2
    assert {p.name for p in tmp_path.iterdir()} == {*kept, "d" * 64 + ".cubin", "c" * 64 + ".cubin"}


@pytest.mark.parametrize(
    "variables,folder",
    [
        ({"HOME": "/h"}, "/h/.cache/kqprefill"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/kqprefill"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "x"}, "/h/.cache/kqprefill"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "KQPREFILL_CACHE_DIR": "/k"}, "/k"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "", "KQPREFILL_CACHE_DIR": "k"}, "/h/.cache/kqprefill"),
        ({"HOME": "h"}, "HOME/.cache/kqprefill"),
        ({"HOME": ""}, "HOME/.cache/kqprefill"),
        ({}, "HOME/.cache/kqprefill"),
    ],
)
def test_the_folder_is_never_in_the_current_one(variables, folder, monkeypatch):
    import pwd

    for name in ("HOME", "XDG_CACHE_HOME", "KQPREFILL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(KernelCache().folder) == folder.replace("HOME", pwd.getpwuid(os.getuid()).pw_dir)


def test_nobody_who_has_no_home(compiled, monkeypatch, tmp_path):
    import pwd

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name, value in (("HOME", ""), ("XDG_CACHE_HOME", "a"), ("KQPREFILL_CACHE_DIR", "b")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    cache = KernelCache()
    assert cache.get(SCALES, TARGET) == (b"scales.cu", False)
    assert "absolute path" in cache.why_off() and cache.held() == cache.clear() == (0, 0)
    assert not list(tmp_path.iterdir())


def a_loop(path):
    path.symlink_to(path)


def unreadable(path):
    path.mkdir(mode=0)


PLACES = {
    "a file": lambda path: path.write_text(""),
    "a loop of links": a_loop,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
    "no permission": unreadable,
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("sub", ["", "/deeper", "/\x1b[31mred"])
@pytest.mark.parametrize("place", PLACES)
def test_doctor_always_reports(place, sub, tmp_path):
    PLACES[place](tmp_path / "cache")
    environment = {**os.environ, "KQPREFILL_CACHE_DIR": f"{tmp_path}/cache{sub}", "PYTHONPATH": str(ROOT)}
    code = "from kqprefill.cli import main; import sys; sys.argv[1:] = ['doctor', '--json']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode in (0, 1) and not done.stderr
    report = json.loads(done.stdout)
    assert f"{tmp_path}/cache" in report["found"]["kernel cache"]
    fine = place in ("nothing", "a folder") or (place == "no permission" and os.getuid() == 0)
    assert fine != any("every start compiles" in problem for problem in report["problems"])


def test_doctor_says_which_variables_do_not_count(tmp_path):
    environment = {**os.environ, "KQPREFILL_CACHE_DIR": "here", "XDG_CACHE_HOME": "there", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "kqprefill", "doctor", "--json"], capture_output=True, env=environment, cwd=tmp_path
    )
    problems = " ".join(json.loads(done.stdout)["problems"])
    shown = subprocess.run(
        [sys.executable, "-m", "kqprefill", "cache", "--json"], capture_output=True, env=environment, cwd=tmp_path
    )
    assert shown.stderr.count(b"it is ignored") == 2 and os.path.isabs(json.loads(shown.stdout)["folder"])
    assert "KQPREFILL_CACHE_DIR is 'here'" in problems and "XDG_CACHE_HOME is 'there'" in problems
    assert not Path(tmp_path / "here").exists()
