"""One model within one budget of GPU memory: how fast it loads and runs, and the most memory that it took.

python tests/bench/stream.py MODEL|SHAPE:RECIPE all|SIZE T,T,… [REPETITIONS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time

import numpy as np

from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.cli.common import open_file
from kqprefill.engine.model import Model, open_model

WARM_UP = 2  # prompts of each length that are not measured


def watch_memory(most: list[int]) -> None:
    """Keep in most[0] the largest memory that the whole GPU held so far, in MiB, as nvidia-smi sees it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            most[0] = max(most[0], int(line))


def rate(model: Model, length: int, repetitions: int) -> str:
    """In words, the tokens/s of prompts of so many tokens: mean and standard deviation."""
    tokens = np.random.default_rng(length).integers(0, model.config.vocab_size, length)
    times = [model.prefill(tokens).timings["prefill"] for _ in range(WARM_UP + repetitions)][WARM_UP:]
    mean, deviation = statistics.mean(times), statistics.pstdev(times)
    return f"T={length} {length / mean:.0f} ± {length * deviation / mean**2:.0f} tok/s"


def rate_of_copies(model: Model, rounds: int = 5) -> float:
    """Bytes a second of the streamed layers' copies by themselves, repacked but with nothing computed: what a batch
    that waits for the bus could reach at best."""
    backend = model.backend
    assert isinstance(backend, CudaBackend) and backend.plan is not None
    backend.gpu.device.sync()
    start = time.perf_counter()
    for _ in range(rounds):
        for layer in backend.plan.streamed:
            backend.weights.begin_layer(layer)
    backend.gpu.device.sync()
    return rounds * backend.plan.streamed_bytes / (time.perf_counter() - start)


def host_memory() -> str:
    """In words, what this process holds of main memory: its own, and of files."""
    with open("/proc/self/status", encoding="utf-8") as file:
        status = dict(line.split(":", 1) for line in file)
    return ", ".join(f"{key} {int(status[key].split()[0]) >> 10} MiB" for key in ("RssAnon", "RssFile"))


def main(name: str, vram: str, lengths: str, repetitions: str = "3") -> None:
    """Load the model, run its prompts, print one line."""
    prompt_lengths, most = [int(word) for word in lengths.split(",")], [0]
    threading.Thread(target=watch_memory, args=(most,), daemon=True).start()
    budget = None if vram == "all" else vram
    with open_model(open_file(name), "cuda", vram=budget, max_tokens=max(prompt_lengths)) as model:
        (plan,), loaded = model.backend.plans, model.backend.loaded
        assert loaded is not None, "the CUDA backend says what it has loaded"
        loading = f"loaded {loaded.nbytes / 1e9:.2f} GB at {loaded.nbytes / loaded.seconds / 1e9:.1f} GB/s"
        rates = [rate(model, length, int(repetitions)) for length in prompt_lengths]
        if plan.streamed:
            copies, (plan,) = rate_of_copies(model), model.backend.plans
            loading += f"; {plan.streamed_bytes / 1e9:.2f} GB a batch at {copies / 1e9:.1f} GB/s by themselves, "
            loading += f"{plan.streamed_bytes / copies:.3f} s"
        print(
            f"{name.rsplit('/', 1)[-1]}, {vram}: {len(plan.streamed)} of {len(model.family.blocks)} layers streamed; "
            f"{'; '.join(rates)}; {loading}; "
            f"GPU {most[0]} MiB (planned {plan.nbytes >> 20}); host {host_memory()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
