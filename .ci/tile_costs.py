"""Measures what a step of each of Hopper's GEMM tiles costs, on the matrices of Qwen3-8B's shape in Q4_K: the last two columns of
HOPPER_TILES in kqprefill/backends/cuda/tiles.py, printed as that table. usage: python3 .ci/tile_costs.py"""

from dataclasses import astuple, replace
import statistics

import numpy as np

from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.backends.cuda.device import check
from kqprefill.backends.cuda.gemm import HopperGemm, Operand
from kqprefill.backends.cuda.graphs import capture
from kqprefill.backends.cuda.tensor_maps import TensorMaps
from kqprefill.backends.cuda.tiles import HOPPER_TILES, K_MULTIPLE
from kqprefill.synthetic import Shape, SyntheticFile
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model

LAYERS, LAUNCHES, HIDDEN, FFN = 4, 12, 4096, 12288  # layers: so that no weights are answered from the L2 cache
SHAPE = Shape("qwen3", LAYERS, HIDDEN, 32, 8, 128, FFN, 1024, 4096, 1e4)
PRODUCTS = {
    ("attn_q", "attn_k", "attn_v"): HIDDEN,
    ("attn_output",): HIDDEN,
    ("ffn_gate", "ffn_up"): HIDDEN,
    ("ffn_down",): FFN,
}


def microseconds(gpu, launch):
    """Of one of LAUNCHES launches in a CUDA graph; the best of three."""
    driver, stream, timing = gpu.driver, gpu.stream.handle, gpu.core.EventOptions(timing_enabled=True)
    launch(0)
    gpu.stream.sync()
    graph, _ = capture(gpu, lambda: [launch(i % LAYERS) for i in range(LAUNCHES)])
    times = []
    for _ in range(3):
        start = gpu.stream.record(options=timing)
        check(driver.cuGraphLaunch(graph, stream))
        end = gpu.stream.record(options=timing)
        end.sync()
        times.append((end - start) * 1e3 / LAUNCHES)
    check(driver.cuGraphExecDestroy(graph))
    return min(times)


def main():
    backend = CudaBackend(0)
    gpu, work = backend.gpu, backend.workspace
    backend.load(read_model(SyntheticFile(SHAPE, lambda *_: GGML.Q4_K, "tiles")), lambda *_: None)
    gemm = HopperGemm(gpu, backend.kernels, TensorMaps(gpu, backend.weights))
    scale = backend.weights.constant_scale(1.0)
    backend.kernels.prepare([tile.program((GGML.Q4_K,)) for tile in HOPPER_TILES], lambda *_: None)
    rng, costs = np.random.default_rng(0), {tile: {} for tile in HOPPER_TILES}
    for tile in HOPPER_TILES:
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
                matrices = [
                    [backend.weights._matrices[f"blk.{i}.{name}.weight"] for name in names] for i in range(LAYERS)
                ]

                def launch(layer):
                    if tile.gated:
                        gemm.gated(x, *matrices[layer], act, tokens, scale, (0, 0), 0)
                    else:
                        gemm.linear(x, matrices[layer], out, tokens, scale, 0, add=False)

                blocks = tile._count(tokens, sum(m.row_tiles for m in matrices[0]), experts=0)
                rounds = -(-blocks // gpu.multiprocessors)
                step = microseconds(gpu, launch) * 1e3 / (columns / K_MULTIPLE)
                costs[tile].setdefault(rounds == 1, []).append(step / rounds)
    for tile, measured in costs.items():
        shared = statistics.mean(measured.get(False) or measured[True])
        alone = min(measured.get(True) or [shared]) if tile.blocks > 1 else shared
        row = astuple(replace(tile, alone=round(alone), shared=round(min(alone, shared))))
        print(f"    HopperTile({', '.join(map(str, row))}),")


main()
