"""Importance matrices at speed: tokens/s of `kqprefill imatrix` beside those of one long prompt, and of the
same batches without it.

python tests/bench/imatrix.py [SHAPE:RECIPE [SIZE]]    512 chunks of 512 tokens; SIZE: --vram's
"""

from __future__ import annotations

import sys
import time

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.core import Batch, PendingHead, Segment, no_progress
from kqprefill.engine.imatrix import CONTEXT, importance_matrix
from kqprefill.engine.model import Model, open_model

MODEL, CHUNKS, LONG_PROMPT = "qwen3-8b:Q4_K_M", 512, 8192


def plain(model: Model, ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Tokens/s of the same chunks in the same batches, of whose logits only the last position's are computed."""
    at_once = max(1, model.backend.batch_size(model.family).tokens // CONTEXT) * CONTEXT
    start, waiting = time.perf_counter(), None
    for begin in range(0, len(ids), at_once):
        own = ids[begin : begin + at_once]
        segments = tuple(Segment(at, CONTEXT) for at in range(0, len(own), CONTEXT))
        pending: PendingHead
        if waiting is not None:
            waiting()
        pending, _ = model.backend.run(model.family, Batch(own, segments=segments), None, None, no_progress)
        waiting = pending
    if waiting is not None:
        waiting()
    return len(ids) / (time.perf_counter() - start)


def collected(model: Model, ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Tokens/s of an importance matrix, with what it takes to make room for the sums and to fetch them."""
    start = time.perf_counter()
    importance_matrix(model, ids.tolist(), batch_tokens=model.backend.batch_size(model.family).tokens)
    return len(ids) / (time.perf_counter() - start)


def main(arguments: list[str]) -> None:
    """Print the rates and their ratios, of three rounds."""
    name, vram = [*arguments, *(MODEL, None)[len(arguments) :]][:2]
    assert name is not None
    with open_model(open_file(name), "cuda", vram=vram, ranks=True) as model:
        rng = np.random.default_rng(0)  # the same input in every run, so that runs compare
        ids = rng.integers(0, model.config.vocab_size, CHUNKS * CONTEXT).astype(np.int32)
        prompt = ids[:LONG_PROMPT]
        collected(model, ids)  # compiles
        for _ in range(3):
            model.prefill(prompt)
            one = LONG_PROMPT / model.prefill(prompt).timings["prefill"]
            without, own = plain(model, ids), collected(model, ids)
            print(
                f"{name} {vram or 'all'}: {own:.0f} tok/s, {own / without:.3f} of the same batches without "
                f"({without:.0f}), {own / one:.3f} of one prompt of {LONG_PROMPT} ({one:.0f})"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
