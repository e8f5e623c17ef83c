"""Scoring at speed: input files for `kqprefill score`, and tokens/s beside those of one long prompt.

usage: .ci/score.py [SHAPE:RECIPE]       2000 prompts of 50 to 2000 tokens through Model.score, and one of 8192
       .ci/score.py perplexity           of 512 windows of 512 tokens, and one prompt of 8192
       .ci/score.py write prompts|questions FILE     those prompts, or 2000 prompts of 100 tokens with four choices of 20, as JSONL
"""

import json
import sys
import time

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.engine.model import open_model
from kqprefill.engine.perplexity import perplexity
from kqprefill.engine.scoring import BATCH_TOKENS

random = np.random.default_rng(0)
VOCABULARY, COUNT = 151936, 2000


def ids(n):
    return random.integers(0, VOCABULARY, n).tolist()


def records(kind):
    if kind == "prompts":
        return [{"tokens": ids(n)} for n in random.integers(50, 2001, COUNT)]
    return [{"tokens": ids(100), "choices": [ids(20) for _ in range(4)]} for _ in range(COUNT)]


def main(what="qwen3-8b:Q4_K_M", *rest):
    if what == "write":
        with open(rest[1], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(rest[0]))
        return
    name = "qwen3-8b:Q4_K_M" if what == "perplexity" else what
    with open_model(open_file(name), "cuda", max_tokens=BATCH_TOKENS, ranks=True) as model:

        def one_prompt():
            return np.mean([8192 / model.prefill(ids(8192)).timings["prefill"] for _ in range(5)])

        def rate(tokens, work):
            begin = time.perf_counter()
            work()
            return tokens / (time.perf_counter() - begin)

        prompts = records("prompts") if what != "perplexity" else []
        text = ids(512 * 512) if what == "perplexity" else []
        list(model.score([ids(1000)] * 30))  # warm
        before = one_prompt()
        if text:
            found = rate(len(text), lambda: perplexity(model, text))
        else:
            found = rate(sum(len(p["tokens"]) for p in prompts), lambda: list(model.score(prompts)))
        after = one_prompt()
    print(
        f"{found:.0f} tok/s, {2 * found / (before + after):.3f} of one 8192-token prompt ({before:.0f} before, {after:.0f} after)"
    )


main(*sys.argv[1:])
