"""One model within one budget of GPU memory: how fast it loads and runs, and the most memory that it took. For .ci/gpu.

usage: stream.py MODEL|SHAPE:RECIPE all|SIZE T,T,… [REPETITIONS]"""

import statistics
import subprocess
import sys
import threading

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.engine.model import open_model


def watch(most):
    """Note the most memory that the whole GPU ever held, in MiB, as nvidia-smi sees it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
    for line in subprocess.Popen(command, stdout=subprocess.PIPE, text=True).stdout:
        most[0] = max(most[0], int(line))


def main(name, vram, lengths, repetitions=3):
    lengths, most = [int(word) for word in lengths.split(",")], [0]
    threading.Thread(target=watch, args=(most,), daemon=True).start()
    with open_model(open_file(name), "cuda", vram=None if vram == "all" else vram, max_tokens=max(lengths)) as model:
        nbytes, seconds = model.backend.weights.loaded
        plan, rates = model.backend.plan, []
        for n in lengths:
            tokens = np.random.default_rng(n).integers(0, model.config.vocab_size, n)
            times = [model.prefill(tokens).timings["prefill"] for _ in range(2 + int(repetitions))][2:]
            rates.append(
                f"T={n} {n / statistics.mean(times):.0f} ± {n * statistics.pstdev(times) / statistics.mean(times) ** 2:.0f} tok/s"
            )
        with open("/proc/self/status", encoding="utf-8") as file:
            status = dict(line.split(":", 1) for line in file)
        host = ", ".join(f"{key} {int(status[key].split()[0]) >> 10} MiB" for key in ("RssAnon", "RssFile"))
        print(
            f"{name.rsplit('/', 1)[-1]}, {vram}: {len(plan.streamed)} of {len(model.family.blocks)} layers streamed; "
            f"{'; '.join(rates)}; loaded {nbytes / 1e9:.2f} GB at {nbytes / seconds / 1e9:.1f} GB/s; "
            f"GPU {most[0]} MiB (planned {plan.nbytes >> 20}); host {host}"
        )


main(*sys.argv[1:])
