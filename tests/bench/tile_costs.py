"""Measures what a step of each configuration of Hopper's GEMM costs, on the matrices of Qwen3-8B's shape in Q4_K.

Prints CONFIGS of kqprefill/backends/cuda/gemm/hopper.py with the last two columns as measured.

    python tests/bench/tile_costs.py
    python tests/bench/tile_costs.py int8 16,128,512     what each of gemm/int8_hopper.py's takes, the fastest first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
import statistics
import sys

import numpy as np

from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.backends.cuda.constants import OPERAND_GROUP
from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32, DeviceArray
from kqprefill.backends.cuda.device.gpu import Gpu, check
from kqprefill.backends.cuda.device.graphs import capture
from kqprefill.backends.cuda.gemm import int8_hopper
from kqprefill.backends.cuda.gemm.hopper import CONFIGS, HopperConfig, HopperGemm
from kqprefill.backends.cuda.gemm.int8_hopper import HopperInt8Config, HopperInt8Gemm
from kqprefill.backends.cuda.gemm.operand import Operand
from kqprefill.backends.cuda.weights.matrix import Matrix
from kqprefill.core import no_progress
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.models.family import Family
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


class GemmOfOneConfig(HopperGemm):
    """Multiplies by one configuration, whatever the cheapest is."""

    def __init__(self, backend: CudaBackend, config: HopperConfig) -> None:
        super().__init__(backend.gpu, backend.launcher, backend.maps)
        self.config = config

    def _config(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> HopperConfig:
        return self.config


def multiply(
    gemm: HopperGemm | HopperInt8Gemm,
    x: Operand,
    layers: list[list[Matrix]],
    out: DeviceArray,
    act: Operand,
    scale: DeviceArray,
    layer: int,
) -> None:
    """Launch one layer's product of all rows of x: gate and up with their activation where there are two matrices."""
    matrices = layers[layer]
    if len(matrices) == 2:
        gate, up = matrices
        gemm.gated(x, gate, up, act, scale, (None, None), "silu")
    else:
        gemm.linear(x, matrices, out, scale, None, add=False)


def step_costs(backend: CudaBackend, family: Family, config: HopperConfig) -> dict[bool, list[float]]:
    """Nanoseconds of a step along K, of launches that take one round of the multiprocessors (True) or more."""
    gpu, work, rng = backend.gpu, backend.work, np.random.default_rng(0)
    scale = backend.context.scales.of_bound(2.0**14)  # 1
    gemm = GemmOfOneConfig(backend, config)
    costs: dict[bool, list[float]] = {}
    for tokens in (config.tokens, 4 * config.tokens):
        out = work.array("out", FLOAT32, tokens, FFN)
        act = Operand(work.array("act", FLOAT16, tokens, FFN), FFN, scale)
        for names, columns in PRODUCTS.items():
            if (len(names) == 2) != bool(config.gated):
                continue
            layers = [[backend.weights.matrix(getattr(weights, name)) for name in names] for weights in family.blocks]
            x = work.array(f"x {columns}", FLOAT16, tokens, columns)
            gpu.upload(x.address, (rng.standard_normal((tokens, columns)) * 0.5).astype(np.float16))
            launch = partial(multiply, gemm, Operand(x, columns, scale), layers, out, act, scale)
            blocks = config.output_tiles(tokens, sum(matrix.row_tiles for matrix in layers[0]), more=0)
            rounds = -(-blocks // gpu.multiprocessors)
            step = microseconds(gpu, launch) * 1e3 / (columns / OPERAND_GROUP)
            costs.setdefault(rounds == 1, []).append(step / rounds)
    return costs


class Int8GemmOfOneConfig(HopperInt8Gemm):
    """The same in int8, of operands that are so already."""

    def __init__(self, backend: CudaBackend, config: HopperInt8Config) -> None:
        super().__init__(backend.gpu, backend.launcher, backend.work, backend.maps)
        self.config = config

    def _config(self, m: int, matrices: Sequence[Matrix], gated: bool, experts: int) -> HopperInt8Config:
        return self.config


def int8_times(backend: CudaBackend, family: Family, tokens: int) -> None:
    """Print microseconds of each product of so many tokens, by tokens/warpgroups/tiles/blocks/cluster of a block."""
    gpu, work, rng = backend.gpu, backend.work, np.random.default_rng(0)
    scale = backend.context.scales.of_bound(2.0**14)  # 1
    out = work.array("out", FLOAT32, tokens, FFN)
    act = Operand(work.array("act", FLOAT16, tokens, FFN), FFN, scale)
    for names, columns in PRODUCTS.items():
        layers = [[backend.weights.matrix(getattr(weights, name)) for name in names] for weights in family.blocks]
        x = work.array(f"x {columns}", FLOAT16, tokens, columns)
        gpu.upload(x.address, (rng.standard_normal((tokens, columns)) * 0.5).astype(np.float16))
        found: list[tuple[float, str]] = []
        for config in int8_hopper.CONFIGS:
            if (len(names) == 2 and config.tiles == 1) or not config.tokens // 2 <= max(tokens, 8) <= 8 * config.tokens:
                continue
            gemm = Int8GemmOfOneConfig(backend, config)
            rounded = gemm.rounded(Operand(x, columns, scale))
            took = microseconds(gpu, partial(multiply, gemm, rounded, layers, out, act, scale))
            found.append((took, "/".join(map(str, astuple(config)[1:6]))))
        print(tokens, names[-1], ", ".join(f"{name} {took:.1f}" for took, name in sorted(found)), flush=True)


def main() -> None:
    """Measure each configuration and print the table."""
    backend = CudaBackend(0)
    family = read_model(SyntheticFile(SHAPE, lambda *_: GGML.Q4_K, "tiles"))
    if sys.argv[1:2] == ["int8"]:
        backend.load(family, no_progress, precision="int8")
        for tokens in sys.argv[2].split(","):
            int8_times(backend, family, int(tokens))
        return
    backend.load(family, no_progress)
    backend.launcher.prepare([config.program((GGML.Q4_K,)) for config in CONFIGS], no_progress)
    for config in CONFIGS:
        measured = step_costs(backend, family, config)
        shared = statistics.mean(measured.get(False) or measured[True])
        alone = min(measured.get(True) or [shared]) if config.blocks > 1 else shared
        row = astuple(replace(config, alone=round(alone), shared=round(min(alone, shared))))
        print(f"    HopperConfig({', '.join(map(str, row))}),")


if __name__ == "__main__":
    main()
