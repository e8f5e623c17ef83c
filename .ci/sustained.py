"""TFLOP/s that cuBLAS holds over a prompt's linears, second by second, in bf16: the bound of a GPU that works without a pause
and is held back by its power limit. gpu_ceilings.py measures bursts of some 40 ms. usage: sustained.py [T] [SECONDS]"""

import sys
import time

import torch

LAYERS = 4  # distinct weights, so that none are answered from the L2 cache
LINEARS = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]  # rows, columns of Qwen3-8B's


def main(tokens=2048, seconds=3):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    weights = [[random(*shape) * 0.02 for shape in LINEARS] for _ in range(LAYERS)]
    inputs = [random(tokens, columns) for _, columns in LINEARS]
    flops = 2 * tokens * LAYERS * sum(rows * columns for rows, columns in LINEARS)

    def layers():
        for layer in weights:
            for x, w in zip(inputs, layer):
                torch.matmul(x, w.t())

    layers()
    torch.cuda.synchronize()
    for _ in range(seconds):
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < 1:
            for _ in range(10):
                layers()
            torch.cuda.synchronize()
            rounds += 10
        print(f"{flops * rounds / (time.perf_counter() - start) / 1e12:.0f}", end=" ", flush=True)
    print()


main(*map(int, sys.argv[1:]))
