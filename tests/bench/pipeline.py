"""A model split over several GPUs beside the same on one: rates, what crosses between the devices, and that all bits
are equal.

python tests/bench/pipeline.py MODEL DEVICES [VRAM] [--alone VRAM] [--what score,prompt] [--count 2000] [--rounds 3]

MODEL: a file, or a SHAPE:RECIPE. DEVICES: as of --device ("0,1"; "0,0" with KQPREFILL_SAME_DEVICE=1 tries one GPU as if
it were two). VRAM: of each device; --alone: of the one device that it is held against, "-" where there is none. score:
COUNT prompts of 50 to 2000 tokens; prompt: one of 32,768 tokens. KQPREFILL_PEER=0: through host memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import hashlib
import time

import numpy as np

from kqprefill.cli.common import open_file, plan_lines
from kqprefill.engine.model import Model, open_model
from kqprefill.engine.scoring import Item

LONG = 32768
WARM = 60  # prompts of the first round, which compiles and finds its memory


def prompts_of(vocab: int, count: int) -> list[Item]:
    """Prompts as of score's benchmark: the same in every run."""
    rng = np.random.default_rng(0)
    return [Item(rng.integers(0, vocab, length).tolist()) for length in rng.integers(50, 2001, count)]


def best(work: Callable[[], str], rounds: int) -> tuple[float, str]:
    """(the best of so many rounds' seconds, what the work gave)"""
    seconds, given = np.inf, ""
    for _ in range(rounds):
        start = time.perf_counter()
        given = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, given


def digest(*arrays: np.ndarray) -> str:
    """A short name of all bits."""
    sums = hashlib.sha256()
    for array in arrays:
        sums.update(np.ascontiguousarray(array).tobytes())
    return sums.hexdigest()[:12]


def scored(model: Model, items: list[Item]) -> str:
    """Score all; the digest of their log-probabilities."""
    return digest(*(one.logprobs for one in model.score(items)))


def prefilled(model: Model, tokens: np.ndarray) -> str:
    """Run one prompt; the digest of its last logits."""
    logits = model.prefill(tokens, "last").logits
    assert logits is not None
    return digest(logits)


def measure(
    name: str, devices: str, vram: str | None, what: list[str], count: int, rounds: int
) -> dict[str, tuple[float, str]]:
    """Rates in tokens a second, and digests, of each kind of work."""
    found = {}
    for kind in what:
        ranks = kind == "score"
        with open_model(
            open_file(name), "cuda", devices, vram=vram, max_tokens=None if ranks else LONG, ranks=ranks
        ) as model:
            if ranks:
                items = prompts_of(model.config.vocab_size, count)
                tokens = sum(len(item.prompt) for item in items)
                scored(model, items[:WARM])
                seconds, bits = best(lambda model=model, items=items: scored(model, items), rounds)  # type: ignore[misc]
            else:
                ids = np.random.default_rng(1).integers(0, model.config.vocab_size, LONG)
                tokens = LONG
                prefilled(model, ids)
                seconds, bits = best(lambda model=model, ids=ids: prefilled(model, ids), rounds)  # type: ignore[misc]
            found[kind] = tokens / seconds, bits
            print(
                f"{name}, {kind}, devices {devices}, {vram or 'all'}: {tokens / seconds:.0f} tokens/s, bits {bits}",
                flush=True,
            )
            for plan in model.backend.plans:
                print(
                    "   ", next(iter(plan_lines(plan, model.family))), f"; {plan.share}, {len(plan.streamed)} streamed"
                )
            for line in model.backend.report:
                print("   ", line)
    return found


def main() -> None:
    """Print both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("devices")
    parser.add_argument("vram", nargs="?")
    parser.add_argument("--alone")
    parser.add_argument("--what", default="score,prompt")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    kinds = given.what.split(",")
    alone = {}
    if given.alone != "-":
        alone = measure(
            given.model, given.devices.split(",")[0], given.alone or given.vram, kinds, given.count, given.rounds
        )
    for kind, (rate, bits) in measure(given.model, given.devices, given.vram, kinds, given.count, given.rounds).items():
        line = f"{given.model} {kind}: {rate:.0f} tokens/s over {given.devices}"
        if kind in alone:
            one, its = alone[kind]
            line += f", {rate / one:.3f} of one device's {one:.0f}; bits {'equal' if bits == its else 'NOT EQUAL'}"
        print(line)


if __name__ == "__main__":
    main()
