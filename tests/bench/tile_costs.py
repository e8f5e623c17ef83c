"""Measures what a step of each of Hopper's GEMM tiles costs, on the matrices of Qwen3-8B's shape in Q4_K.

Prints HOPPER_TILES of kqprefill/backends/cuda/tiles.py with the last two columns as measured.

    python tests/bench/tile_costs.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
import statistics
from typing import Any

from kqprefill.backends.cuda.graphs import capture
from kqprefill.backends.cuda.tensor_maps import TensorMaps
from kqprefill.backends.cuda.tiles import HOPPER_TILES, K_MULTIPLE, HopperTile
import numpy as np

from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.backends.cuda.device import Gpu, check
from kqprefill.backends.cuda.gemm import HopperGemm, Operand
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile

LAYERS = 4  # whose distinct weights are multiplied in turn, so that none are answered from the L2 cache
LAUNCHES = 12  # of one measurement
HIDDEN, FFN = 4096, 12288
SHAPE = Shape("qwen3", LAYERS, HIDDEN, 32, 8, 128, FFN, 1024, 4096, 1e4)
PRODUCTS = {
    ("attn_q", "attn_k", "attn_v"): HIDDEN,
    ("attn_output",): HIDDEN,
    ("ffn_gate", "ffn_up"): HIDDEN,
    ("ffn_down",): FFN,
}


def microseconds(gpu: Gpu, launch: Callable[[int], object]) -> float:
    """Of one of LAUNCHES launches in a CUDA graph, launch(layer) each; the best of three graphs."""
    driver, stream, timing = gpu.driver, gpu.stream.handle, gpu.core.EventOptions(timing_enabled=True)
    launch(0)
    gpu.stream.sync()
    graph, _ = capture(gpu, lambda: [launch(i % LAYERS) for i in range(LAUNCHES)])
    times: list[float] = []
    for _ in range(3):
        start = gpu.stream.record(options=timing)
        check(driver.cuGraphLaunch(graph, stream))
        end = gpu.stream.record(options=timing)
        end.sync()
        times.append((end - start) * 1e3 / LAUNCHES)
    check(driver.cuGraphExecDestroy(graph))
    return min(times)


def multiply(gemm: HopperGemm, x: Operand, layers: list[Any], out: int, act: Operand, scale: int, layer: int) -> None:
    """Launch one layer's product of all rows of x: gate and up with their activation where there are two matrices."""
    matrices = layers[layer]
    if len(matrices) == 2:
        gemm.gated(x, *matrices, act, x.rows, scale, (0, 0), 0)
    else:
        gemm.linear(x, matrices, out, x.rows, scale, 0, add=False)


def step_costs(backend: CudaBackend, gemm: HopperGemm, tile: HopperTile) -> dict[bool, list[float]]:
    """Nanoseconds of a step along K, of launches that take one round of the multiprocessors (True) or more."""
    gpu, work, weights = backend.gpu, backend.workspace, backend.weights
    scale, rng = weights.constant_scale(1.0), np.random.default_rng(0)
    costs: dict[bool, list[float]] = {}
    gemm._tile = lambda *_, **__: tile
    for tokens in (tile.tokens, 4 * tile.tokens):
        out = work.get("out", 4 * tokens * FFN)
        act = Operand(work.get("act", 2 * tokens * FFN), FFN, scale, tokens)
        for names, columns in PRODUCTS.items():
            if (len(names) == 2) != tile.gated:
                continue
            address = work.get(f"x {columns}", 2 * tokens * columns)
            gpu.upload(address, (rng.standard_normal((tokens, columns)) * 0.5).astype(np.float16))
            x = Operand(address, columns, scale, tokens)
            layers = [[weights._matrices[f"blk.{i}.{name}.weight"] for name in names] for i in range(LAYERS)]
            launch = partial(multiply, gemm, x, layers, out, act, scale)
            blocks = tile._count(tokens, sum(m.row_tiles for m in layers[0]), experts=0)
            rounds = -(-blocks // gpu.multiprocessors)
            step = microseconds(gpu, launch) * 1e3 / (columns / K_MULTIPLE)
            costs.setdefault(rounds == 1, []).append(step / rounds)
    return costs


def main() -> None:
    """Measure each tile and print the table."""
    backend = CudaBackend(0)
    backend.load(read_model(SyntheticFile(SHAPE, lambda *_: GGML.Q4_K, "tiles")), lambda *_: None)
    gemm = HopperGemm(backend.gpu, backend.kernels, TensorMaps(backend.gpu, backend.weights))
    backend.kernels.prepare([tile.program((GGML.Q4_K,)) for tile in HOPPER_TILES], lambda *_: None)
    for tile in HOPPER_TILES:
        measured = step_costs(backend, gemm, tile)
        shared = statistics.mean(measured.get(False) or measured[True])
        alone = min(measured.get(True) or [shared]) if tile.blocks > 1 else shared
        row = astuple(replace(tile, alone=round(alone), shared=round(min(alone, shared))))
        print(f"    HopperTile({', '.join(map(str, row))}),")


if __name__ == "__main__":
    main()
