"""Compares two versions of kqprefill bit by bit: writes what a version computes, and holds two such folders together.

    PYTHONPATH=/path/to/old python tests/bench/bits.py write before
    PYTHONPATH=/path/to/new python tests/bench/bits.py write after
    python tests/bench/bits.py compare before after

On a CPU with version 0.1 the number of threads that NumPy's BLAS uses decides how it sums: give it one
(OPENBLAS_NUM_THREADS=1), as later versions do by themselves.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen3.gguf"
# The models with reference tokens: those released with the tests, and those that lie in or beside a development tree.
MODEL_FOLDERS = (ROOT / "tests/data", ROOT / "shared/conformance", ROOT.parent / "shared/conformance")
SEED = 12
# A GPU launches the kernels of a new prompt length one by one, captures them as a graph when the length comes again,
# and replays the graph from then on.
CUDA_RUNS = 3
# Lengths on both sides of the tiles that attention works in, up to several of them.
SEQUENCE_LENGTHS = (5, 1, 130, 33, 300, 2, 64, 65, 129)
# (tokens of the prompt, tokens of each choice that continues it).
CHOICE_LENGTHS = ((200, (1, 40, 3, 150)), (128, (2, 2)), (40, (1, 1, 1, 1)), (70, (9,)), (0, (3, 4)))

Arrays = dict[str, Any]  # of NumPy


def find_models(patterns: Iterable[str]) -> dict[str, Path]:
    """Name and path of each model to run; patterns: globs, of which a name matches any."""
    found = {EXAMPLE.stem: EXAMPLE}
    for folder in reversed(MODEL_FOLDERS):
        found.update((path.stem, path) for path in sorted(folder.glob("*.gguf")))
    return {name: path for name, path in sorted(found.items()) if any(Path(name).match(p) for p in patterns)}


def prompt_of(path: Path, vocab_size: int) -> NDArray[np.integer[Any]]:
    """The reference tokens that lie beside the model, or random ones where there are none; [T]."""
    reference = path.with_suffix(".npz")
    if reference.exists():
        tokens: NDArray[np.integer[Any]] = np.load(reference)["tokens"]
        return tokens
    return np.random.default_rng(SEED).integers(0, vocab_size, 300)


def records_of(vocab_size: int, context_length: int) -> list[Any]:
    """What `Model.score` is given: plain sequences, and prompts with choices that share them."""
    rng = np.random.default_rng(SEED)

    def ids(length: int) -> list[int]:
        tokens: list[int] = rng.integers(0, vocab_size, length).tolist()
        return tokens

    plain = [ids(length) for length in SEQUENCE_LENGTHS if length <= context_length]
    choices = [
        {"tokens": ids(prompt), "choices": [ids(length) for length in lengths]}
        for prompt, lengths in CHOICE_LENGTHS
        if prompt + max(lengths) <= context_length
    ]
    return [*plain, *choices]


def flatten(results: Iterable[Any]) -> Iterator[Any]:
    """Each Scored, whether it came alone or in the list of a record with choices."""
    for result in results:
        yield from result if isinstance(result, list) else [result]


def logits_of(model: Any, tokens: NDArray[Any], cache: Any = None) -> NDArray[Any]:
    """Every position's, float32 [T, V]."""
    logits: NDArray[Any] = model.prefill(tokens, logits="all", cache=cache).logits
    return logits


def compute(path: Path, options: Namespace) -> Arrays | None:
    """Everything that is written of a model, by name; None where the model is not supported."""
    import kqprefill

    try:
        model = kqprefill.load(path, backend=options.backend, kernels=options.kernels)
    except (kqprefill.ModelError, kqprefill.GGUFError) as error:
        print(f"left out: {error}", file=sys.stderr)
        return None
    arrays: Arrays = {}
    with model:
        tokens = prompt_of(path, model.config.vocab_size)
        for run in range(CUDA_RUNS if options.backend == "cuda" else 1):
            arrays[f"logits, run {run}"] = logits_of(model, tokens)
        cache = model.new_cache(len(tokens))
        cuts = [1, 1 + len(tokens) // 3, 2 + len(tokens) // 2]
        for index, piece in enumerate(np.split(tokens, cuts)):
            arrays[f"logits, piece {index}"] = logits_of(model, piece, cache)
        records = records_of(model.config.vocab_size, model.config.context_length)
        for index, scored in enumerate(flatten(model.score(records, top=3))):
            for field in ("logprobs", "top_tokens", "top_logprobs"):
                arrays[f"score {index}, {field}"] = getattr(scored, field)
    return arrays


def write(options: Namespace) -> int:
    """Write FOLDER/MODEL.npz for each model that is found and supported."""
    import kqprefill

    print(f"{Path(kqprefill.__file__).parent}, backend {options.backend}, kernels {options.kernels}")
    options.folder.mkdir(parents=True, exist_ok=True)
    start, written = time.perf_counter(), 0
    for name, path in find_models(options.models or ["*"]).items():
        arrays = compute(path, options)
        if arrays is not None:
            np.savez(options.folder / f"{name}.npz", **arrays)
            written += 1
    print(f"{written} models written to {options.folder} in {time.perf_counter() - start:.1f} s")
    return 0 if written else 1


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> str:
    """In words, how far two arrays that are not equal byte for byte are from each other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
    return f"largest difference {np.abs(a.astype(np.float64) - b.astype(np.float64)).max():.3g}"


def compare(options: Namespace) -> int:
    """Print how many arrays of two folders are equal byte for byte, and each that is not or is missing; 1 if any is."""
    files = sorted({path.name for folder in (options.a, options.b) for path in folder.glob("*.npz")})
    equal, different = 0, []
    for file in files:
        if not (options.a / file).exists() or not (options.b / file).exists():
            different.append(f"{file}: only in {options.a if (options.a / file).exists() else options.b}")
            continue
        with np.load(options.a / file) as a, np.load(options.b / file) as b:
            for name in sorted({*a.files, *b.files}):
                if name not in a.files or name not in b.files:
                    different.append(f"{file}: {name}: only in {options.a if name in a.files else options.b}")
                elif (
                    a[name].dtype == b[name].dtype
                    and a[name].shape == b[name].shape
                    and bytes(a[name]) == bytes(b[name])
                ):
                    equal += 1
                else:
                    different.append(f"{file}: {name}: {largest_difference(a[name], b[name])}")
    for line in different:
        print(line)
    print(f"{equal} arrays of {len(files)} models are equal byte for byte, {len(different)} are not")
    return 1 if different or not equal else 0


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="write what the kqprefill that is imported computes")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    writing.add_argument("--kernels", choices=("auto", "portable"), default="auto")
    writing.add_argument(
        "--models", metavar="GLOB", action="append", help="only models of such a name; may be repeated"
    )
    writing.set_defaults(command=write)
    comparing = commands.add_parser("compare", help="hold two folders together")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.set_defaults(command=compare)
    options = parser.parse_args()
    status: int = options.command(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
