"""Tokens/s of scoring many prompts of random lengths, beside those of one long prompt.
usage: .ci/score.py [SHAPE:RECIPE] [prompts] [batch tokens]"""

import sys
import time

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.engine.model import open_model

name, count, batch_tokens = (sys.argv[1:] + ["qwen3-8b:Q4_K_M", "2000", "8192"][len(sys.argv) - 1 :])[:3]
count, batch_tokens = int(count), int(batch_tokens)
random = np.random.default_rng(0)
with open_model(open_file(name), "cuda", max_tokens=max(batch_tokens, 8192), ranks=True) as model:

    def ids(n):
        return random.integers(0, model.config.vocab_size, n).tolist()

    def one_prompt():
        return 8192 / model.prefill(ids(8192)).timings["prefill"]

    def many(prompts):
        begin = time.perf_counter()
        scored = sum(s.n_tokens for s in model.score(prompts, batch_tokens))
        assert scored == sum(map(len, prompts)) - len(prompts)
        return sum(map(len, prompts)) / (time.perf_counter() - begin)

    one_prompt(), many([ids(1000)] * 30)
    before = np.mean([one_prompt() for _ in range(5)])
    rate = many([ids(n) for n in random.integers(50, 2001, count)])
    after = np.mean([one_prompt() for _ in range(5)])
    base = (before + after) / 2
    print(
        f"score {name}: {count} prompts of 50 to 2000 in batches of {batch_tokens}: {rate:.0f} tok/s, "
        f"{rate / base:.3f} of one 8192-token prompt ({before:.0f} before, {after:.0f} after)"
    )
