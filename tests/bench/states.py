"""How fast a state is written and read: python tests/bench/states.py MODEL|SHAPE:RECIPE TOKENS FOLDER [TYPE]

Prints the tokens a second of a prompt with a cache that is kept, of the same with its state written to FOLDER while it
is computed, and of reading it back; on the GPU where there is one. The issue's bound is 0.8 of the rate without, to
tmpfs (/dev/shm).
"""

from pathlib import Path
import sys
import time

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.engine.model import open_model


def main() -> None:
    name, count, folder, *rest = sys.argv[1:]
    tokens, kind, path = int(count), rest[0] if rest else "f16", Path(folder) / "kqprefill-bench.state"
    with open_model(open_file(name), max_tokens=tokens) as model:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
        cache = model.new_cache(tokens + 1)
        best: dict[str, float] = {}
        try:
            for _ in range(3):
                for what in ("kept", "written"):
                    cache.reset()
                    path.unlink(missing_ok=True)  # so that no time goes into freeing it
                    start = time.perf_counter()
                    if what == "kept":
                        model.prefill(ids, cache=cache)
                    else:
                        waited = model.save_state(path, ids, cache, keys=kind, values=kind).timings["state"]
                        print(f"after the last layer: {waited:.3f} s")
                    best[what] = min(best.get(what, np.inf), time.perf_counter() - start)
            nbytes = path.stat().st_size
            model.drop_cache(cache)
            start = time.perf_counter()
            model.load_state(path, room=1)
            best["read"] = time.perf_counter() - start
        finally:
            path.unlink(missing_ok=True)
    print(f"{model.backend.device_name}, {name}, {tokens} tokens, {nbytes / 1e9:.2f} GB in {kind}")
    for what, seconds in best.items():
        print(f"{what:8} {seconds:7.3f} s  {tokens / seconds:8.0f} tokens/s  {nbytes / seconds / 1e9:6.2f} GB/s")
    print(f"written / kept: {best['kept'] / best['written']:.3f} of the rate")


main()
