"""Kernels compile without a GPU for every architecture we claim, and none spills; and the cache of what came out."""

from concurrent.futures import ThreadPoolExecutor
import io
import multiprocessing
import os
import re

import pytest

from conftest import is_taken
from kqprefill.backends.cuda.attention_kernels import portable_attention
from kqprefill.backends.cuda.device.compiler import KernelCache, Program, Target, compile_program
from kqprefill.backends.cuda.gemm.portable import LARGE, MEDIUM, SMALL, fitting
from kqprefill.backends.cuda.kernel_set import ARCHITECTURES, every_program

SMALLEST_SHARED_MEMORY = 99 << 10  # a block's, on sm_86, sm_89 and sm_120


def one_of_each_file(programs):
    """The first program of each .cu file."""
    return list({program.source: program for program in reversed(programs)}.values())


def check_compiles_without_spills(program, arch):
    log = io.StringIO()
    code = compile_program(program, Target("cubin", arch), logs=log)
    assert code[:4] == b"\x7fELF", program
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    assert spills and not any(map(int, spills)), f"{program} for {arch}:\n{log.getvalue()}"
    assert not re.search("warning|serialized", log.getvalue()), f"{program} for {arch}:\n{log.getvalue()}"


FAST = ["sm_80", "sm_90a"]  # of which one program of each file is compiled by the fast tests


@pytest.mark.parametrize("arch", FAST)
def test_one_of_each_file_compiles_without_spills(arch):
    """The files of every GPU, and those of Hopper."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda p: check_compiles_without_spills(p, arch), one_of_each_file(every_program(arch))))


def of_a_rare_format(program):
    """Whether it is Hopper's GEMM for one format that is not among the commonest, in tiles between the smallest and the
    largest: CI has no time for all of these (`.ci/gpu tests` compiles them)."""
    constants = dict(program.defines)
    usual = {"Q4_K", "Q6_K", "Q8_0", "MXFP4"}
    kind = constants.get("FORMATS", "Q4_K")
    return "," not in kind and kind not in usual and constants["TOKENS"] not in ("16", "256")


def in_share(program):
    """Whether it is compiled with this seed (conftest.py): all but Hopper's products of Q4_K alone take turns."""
    constants = dict(program.defines)
    return (program.source == "gemm_sm90.cu" and constants["FORMATS"] == "Q4_K") or is_taken(str(program))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_compile_without_spills(arch):
    """Those of the oldest GPUs, and Hopper's own, or a share of them; of the others, whose kernels are the oldest's,
    one of each file. A program that passed is not compiled again until its key in the cache changes: a file of that
    name, beside the cache's own (in $KQPREFILL_CACHE_DIR), remembers it."""
    every = every_program(arch)
    oldest = {"sm_80": set(), "sm_90a": set(every_program("sm_80"))}.get(arch, set(every))
    programs = [] if arch in FAST else one_of_each_file(every)
    programs += [own for own in every if own not in oldest and not of_a_rare_format(own) and in_share(own)]
    cache = KernelCache()
    passed = cache.folder / "compiled-without-spills"
    passed.mkdir(mode=0o700, parents=True, exist_ok=True)

    def check(program):
        mark = passed / cache._key(program, Target("cubin", arch))
        if not mark.exists():
            check_compiles_without_spills(program, arch)
            mark.touch()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, programs))


def test_tiles_fit_every_gpu():
    gemms = [fitting(size, SMALLEST_SHARED_MEMORY).program() for size in (LARGE, MEDIUM, SMALL)]
    attention = [portable_attention(head_dim, head_dim).program() for head_dim in (32, 64, 80, 96, 112, 128, 192, 256)]
    assert all(program.shared_bytes <= SMALLEST_SHARED_MEMORY for program in gemms + attention)


SCALES = Program("scales.cu")


def entries(folder):
    return sorted(folder.iterdir())


def test_cache_hits_and_mends_damage(tmp_path):
    cache = KernelCache(tmp_path / "cache")
    code, hit = cache.get(SCALES, Target("cubin", "sm_90a"))
    assert not hit and (tmp_path / "cache").stat().st_mode & 0o077 == 0
    assert cache.get(SCALES, Target("cubin", "sm_90a")) == (code, True)
    (entry,) = entries(tmp_path / "cache")
    for damage in (entry.read_bytes()[:100], b"", entry.read_bytes()[:-1] + b"?"):
        entry.write_bytes(damage)
        assert cache.get(SCALES, Target("cubin", "sm_90a")) == (code, False)
        assert cache.get(SCALES, Target("cubin", "sm_90a")) == (code, True)


def test_cache_keys_tell_programs_apart(tmp_path):
    cache = KernelCache(tmp_path)
    for program, arch in (
        (SCALES, "sm_80"),
        (SCALES, "sm_90a"),
        (Program("norm.cu"), "sm_80"),
        (Program("norm.cu", (("X", "1"),)), "sm_80"),
    ):
        assert not cache.get(program, Target("cubin", arch))[1]
    assert len(entries(tmp_path)) == 4


def test_a_cache_that_others_may_write_is_not_believed(tmp_path):
    cache = KernelCache(tmp_path)
    cache.get(SCALES, Target("cubin", "sm_80"))
    tmp_path.chmod(0o777)
    assert not cache.get(SCALES, Target("cubin", "sm_80"))[1]


def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert KernelCache(tmp_path / "file" / "cache").get(SCALES, Target("cubin", "sm_80"))[0][:4] == b"\x7fELF"


def _compile_into(folder):
    return KernelCache(folder).get(SCALES, Target("cubin", "sm_80"))[0]


def test_two_processes_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_compile_into, [tmp_path] * 2)
    assert first == second and [path.suffix for path in entries(tmp_path)] == [".cubin"]
