"""Scoring at speed: tokens/s of Model.score beside those of one long prompt, and input files for `kqprefill score`.

python tests/bench/score.py [SHAPE:RECIPE]    2000 prompts of 50 to 2000 tokens, and one prompt of 8192
python tests/bench/score.py perplexity        512 windows of 512 tokens, and one prompt of 8192
python tests/bench/score.py streamed SHAPE:RECIPE SIZE    1000 of those prompts, all layers resident, and within SIZE
python tests/bench/score.py write prompts FILE      those 2000 prompts as JSON lines
python tests/bench/score.py write questions FILE    2000 prompts of 100 tokens, each with four choices of 20
"""

from __future__ import annotations

from collections.abc import Callable
import json
import sys
import time
from typing import Any

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.core import BATCH_TOKENS
from kqprefill.engine.model import Model, open_model
from kqprefill.engine.perplexity import perplexity

MODEL = "qwen3-8b:Q4_K_M"
VOCABULARY, COUNT = 151936, 2000
LONG_PROMPT, WINDOW = 8192, 512

rng = np.random.default_rng(0)  # the same input in every run, so that runs compare


def random_ids(length: int) -> list[int]:
    """Token ids."""
    ids: list[int] = rng.integers(0, VOCABULARY, length).tolist()
    return ids


def make_records(kind: str) -> list[dict[str, Any]]:
    """Records of `kqprefill score`: plain "prompts", or "questions" with choices."""
    if kind == "prompts":
        return [{"tokens": random_ids(length)} for length in rng.integers(50, 2001, COUNT)]
    return [{"tokens": random_ids(100), "choices": [random_ids(20) for _ in range(4)]} for _ in range(COUNT)]


def rate(tokens: int, work: Callable[[], object]) -> float:
    """Tokens/s of work that takes so many."""
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


def rate_of_one_prompt(model: Model) -> float:
    """Tokens/s of one long prompt, in the mean of five."""
    prompts = [random_ids(LONG_PROMPT) for _ in range(5)]
    return float(np.mean([LONG_PROMPT / model.prefill(prompt).timings["prefill"] for prompt in prompts]))


def measure(name: str, windows: bool) -> None:
    """Print the tokens/s of perplexity's windows, or of prompts, under a model made in memory."""
    with open_model(open_file(name), "cuda", max_tokens=BATCH_TOKENS, ranks=True) as model:
        prompts = [] if windows else make_records("prompts")
        text = random_ids(WINDOW * WINDOW) if windows else []
        list(model.score([random_ids(1000)] * 30))  # the first batches compile kernels and take memory
        before = rate_of_one_prompt(model)
        if windows:
            scored = rate(len(text), lambda: perplexity(model, text))
        else:
            scored = rate(sum(len(p["tokens"]) for p in prompts), lambda: list(model.score(prompts)))
        after = rate_of_one_prompt(model)
    share = 2 * scored / (before + after)
    print(f"{scored:.0f} tok/s, {share:.3f} of one 8192-token prompt ({before:.0f} before, {after:.0f} after)")


def compare(name: str, vram: str) -> None:
    """Print the tokens/s of prompts with all layers on the device, and streamed within so much of its memory."""
    prompts, rates = make_records("prompts")[:1000], []
    for budget in (None, vram):
        with open_model(open_file(name), "cuda", vram=budget, ranks=True) as model:
            size = model.backend.batch_size(model.family)
            list(model.score([random_ids(1000)] * (3 * size.tokens // 1000)))
            rates.append(rate(sum(len(p["tokens"]) for p in prompts), lambda: list(model.score(prompts))))
            print(f"{budget or 'all'}: {rates[-1]:.0f} tok/s, {size.why or f'batches of {size.tokens} tokens'}")
    print(f"{name}, {vram}: {rates[1] / rates[0]:.3f} of the rate with all layers on the device")


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    if arguments[:1] == ["write"]:
        _, kind, path = arguments
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in make_records(kind))
    elif arguments[:1] == ["streamed"]:
        compare(*arguments[1:])
    elif arguments == ["perplexity"]:
        measure(MODEL, windows=True)
    else:
        [name] = arguments or [MODEL]
        measure(name, windows=False)


if __name__ == "__main__":
    main(sys.argv[1:])
