"""Plants faults, one at a time, in a copy of the source tree, and says which test that needs no GPU catches each.

    python tests/bench/faults.py [NAME …]        those whose name contains one of the words; all by default

A test suite is as good as the faults that it finds. Exit status 1 where one survives, or cannot be planted because the
text that it changes is no longer there: then the table below is to be brought up to date.
"""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "kqprefill",
    "kernels",
    "tests",
    "examples",
    "docs",
    "README.md",
    "pyproject.toml",
)  # of the tree, for the tests
SECONDS = 300  # that the tests of one fault may take

LAUNCHES, SCORING = "tests/test_cuda_launches.py", "tests/test_scoring.py"
FAMILIES, KERNELS = "tests/test_families.py", "tests/test_kernels.py"
CUDA = "kqprefill/backends/cuda"


@dataclass(frozen=True)
class Fault:
    """A change of one place: `old`, which stands once in `file`, becomes `new`. tests: the files that may catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "the engine counts on smaller blocks of keys than attention has",
        "kqprefill/core.py",
        "LARGEST_KEY_BLOCK = 128",
        "LARGEST_KEY_BLOCK = 64",
        (LAUNCHES, SCORING),
    ),
    Fault(
        "the engine packs more keys than the memory planned for them",
        "kqprefill/engine/scoring.py",
        "keys <= KEYS_PER_TOKEN * batch_tokens",
        "keys <= 2 * KEYS_PER_TOKEN * batch_tokens",
        (LAUNCHES, SCORING),
    ),
    Fault(
        "the rehearsal makes room for fewer keys than are packed",
        f"{CUDA}/rehearsal.py",
        "KEYS_PER_TOKEN * len(batch.tokens)",
        "len(batch.tokens)",
        (LAUNCHES, SCORING, "tests/test_residency.py"),
    ),
    Fault(
        "a page casts a residual that something without a bound was added to",
        "kqprefill/models/olmo2.py",
        "w.attn_output)\n        x = ops.add_rms_norm(x, a, w.post_attention_norm)",
        "w.attn_output, residual=x)\n        x = a",
        (LAUNCHES, FAMILIES, "tests/test_conformance.py"),
    ),
    Fault(
        "a cast takes any residual",
        f"{CUDA}/ops/dense.py",
        "        if bound is None:\n            raise ModelError(",
        "        if bound is None:\n            return 1.0\n            raise ModelError(",
        (LAUNCHES, FAMILIES),
    ),
    Fault(
        "Hopper's worst tile is taken for the cheapest",
        f"{CUDA}/gemm/tiles.py",
        "    return min(configs, key",
        "    return max(configs, key",
        (LAUNCHES,),
    ),
    Fault(
        "the portable GEMM's tiles are exchanged",
        f"{CUDA}/gemm/portable.py",
        "min(_SIZES, key=cost)",
        "max(_SIZES, key=cost)",
        (LAUNCHES,),
    ),
    Fault(
        "operands are padded and permuted in other groups",
        f"{CUDA}/constants.py",
        "OPERAND_GROUP = 64",
        "OPERAND_GROUP = 128",
        (LAUNCHES, KERNELS),
    ),
    Fault(
        "an activation is told to the kernel by another's number",
        f"{CUDA}/gemm/operand.py",
        '"activation": ACTIVATIONS[activation]',
        '"activation": ACTIVATIONS["gelu_tanh"]',
        (LAUNCHES,),
    ),
    Fault(
        "two activations have one number",
        f"{CUDA}/constants.py",
        '"gelu_tanh": 1',
        '"gelu_tanh": 0',
        (LAUNCHES, KERNELS),
    ),
    Fault(
        "a kernel has half the threads",
        f"{CUDA}/constants.py",
        '"NORM_THREADS": (\n        256,',
        '"NORM_THREADS": (\n        128,',
        (LAUNCHES, KERNELS),
    ),
    Fault(
        "a GEMM has a warp more than its program",
        f"{CUDA}/gemm/portable.py",
        "threads = 32 * self.warps_m * self.warps_n",
        "threads = 32 * self.warps_m * self.warps_n + 32",
        (LAUNCHES, KERNELS),
    ),
    Fault(
        "a norm is told of the columns that are padding, too",
        f"{CUDA}/ops/norms.py",
        "weight=vector,\n            out=out.values,\n            columns=columns,",
        "weight=vector,\n            out=out.values,\n            columns=out.values.shape[1],",
        (LAUNCHES,),
    ),
    Fault(
        "two addresses are swapped",
        f"{CUDA}/gemm/hopper.py",
        "            gate=gate.array,\n            up=up.array,",
        "            gate=up.array,\n            up=gate.array,",
        (LAUNCHES,),
    ),
    Fault(
        "attention's sums keep the weight of scores that are far behind",
        "kernels/include/softmax.cuh",
        "return __any_sync(0xffffffffu, changed);",
        "return false;",
        ("tests/test_attention_scores.py",),
    ),
    Fault(
        "attention's weights may be more than halves hold",
        "kernels/include/softmax.cuh",
        "kMostExponent = 8.0f",
        "kMostExponent = 20.0f",
        ("tests/test_attention_scores.py",),
    ),
    Fault(
        "of a prompt's last position alone the first one is computed",
        f"{CUDA}/ops/batch.py",
        "a.part(a.rows - self.n, a.rows)",
        "a.part(0, self.n)",
        ("tests/test_last_position.py",),
    ),
    Fault(
        "a graph of the last position alone is launched where all are asked for",
        f"{CUDA}/device/graphs.py",
        "        key = tokens, kind\n",
        "        key, kind = (tokens, None), None\n",
        ("tests/test_prompt_graphs.py",),
    ),
    Fault(
        "a prompt that is a graph has the tokens of the one that was captured",
        f"{CUDA}/ops/batch.py",
        "_OVERLAP_FROM\n        self.begin_tokens()\n",
        "_OVERLAP_FROM\n",
        ("tests/test_prompt_graphs.py",),
    ),
    Fault(
        "what another prompt left in its arrays is taken for a prompt's own",
        f"{CUDA}/ops/batch.py",
        "        for name, array in self._of_shape:\n            self.work.keep(name, array)\n",
        "",
        ("tests/test_prompt_graphs.py",),
    ),
    Fault(
        "an array that kernels may have written is taken for what was put there",
        f"{CUDA}/device/workspace.py",
        "        self._kept.pop(name, None)  # it may be written\n",
        "",
        ("tests/test_workspace.py",),
    ),
    Fault(
        "a long prompt's graph is captured without its angles",
        f"{CUDA}/ops/batch.py",
        "        self.rope_tables.clear()\n",
        "",
        ("tests/test_prompt_graphs.py",),
    ),
    Fault(
        "a warpgroup with one row tile writes experts' outputs of two",
        "kernels/include/epilogue_sm90.cuh",
        "bool both = tiles == 2 && column",
        "bool both = column",
        ("tests/test_output_blocks.py",),
    ),
    Fault(
        "a block of experts' outputs is rounded by the largest of some of its columns",
        "kernels/include/token_rows.cuh",
        "most = half2_max(most, larger_halves(second.z, second.w));",
        "",
        ("tests/test_output_blocks.py",),
    ),
    Fault(
        "experts' outputs are added up by the columns' order, not their places'",
        "kernels/include/combine.cuh",
        "static_cast<const uint8_t*>(sums) + output_place(first);",
        "static_cast<const uint8_t*>(sums) + first;",
        ("tests/test_combination.py",),
    ),
    Fault(
        "the CPU does not round experts' outputs",
        "kqprefill/backends/cpu/ops.py",
        "made = in_blocks(made)",
        "pass",
        ("tests/test_output_blocks.py",),
    ),
)


def run_tests(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in a tree, or None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "KQPREFILL_CACHE_DIR": str(tree / "cache")}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"the tests did not end within {SECONDS} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with status {done.returncode}: {done.stderr.strip()[-200:]}"


def try_fault(tree: Path, fault: Fault) -> tuple[bool, str]:
    """Plant a fault, run its tests, take it out again: whether it was caught, and what to say of it."""
    path = tree / fault.file
    sound = path.read_text(encoding="utf-8") if path.exists() else ""
    if sound.count(fault.old) != 1:
        return False, f"not planted: {fault.file} has its text {sound.count(fault.old)} times"
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        failed = run_tests(tree, fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return failed is not None, f"caught by {failed}" if failed else "SURVIVED"


def main(words: list[str]) -> int:
    """Try the faults that the words name, and print a line for each."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for part in filter(Path.exists, (ROOT / part for part in PARTS)):
            copy = shutil.copytree if part.is_dir() else shutil.copy
            copy(part, tree / part.name)
        tests = tuple(dict.fromkeys(test for fault in chosen for test in fault.tests))
        if failed := run_tests(tree, tests):
            print(f"without any fault {failed} fails: nothing can be said")
            return 1
        caught = 0
        for fault in chosen:
            found, verdict = try_fault(tree, fault)
            caught += found
            print(f"{fault.name}: {verdict}", flush=True)
    print(f"{caught} of {len(chosen)} faults are caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
