"""How fast a model could be at best, measured on the GPU at hand: what its speed is held against. Needs PyTorch.

    python tests/bench/bounds.py qwen3-8b 512,2048,8192 --json bounds.json

For each prompt length T it times what a model in dense bf16 that did nothing else would spend on
  linears    every matrix of a layer through cuBLAS, those of experts through PyTorch's grouped GEMM, with each token
             sent to experts at random (the router, under 1% of the work, is left out);
  attention  causal attention of the whole prompt, through PyTorch's flash attention; recurrences count as free.
             It knows neither windows nor heads of more than 256 nor keys and values of different size: of these it is
             the time of the nearest that it knows, by the ratio of the operations;
and prints the tokens/s of such a model in three columns:
  burst      from rest, for some 40 ms: before the card's power limit acts;
  sustained  the last of 1.5 s without a pause: what a corpus job meets;
  8-bit      sustained, with products of e4m3 operands (cuBLASLt, fast accumulation); of shapes without experts only.
Work is replayed as CUDA graphs, so that no gap between launches counts, over several layers' weights, so that none
are answered from the L2 cache. Each kind of a model's layers is timed by itself.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
import json
import math
from pathlib import Path
import time
from typing import TypeAlias

import torch
from torch.nn import functional as F

from kqprefill.core import KeysValues, Latent, SharedKeysValues
from kqprefill.models import read_model
from kqprefill.models.deepseek2 import DeepSeek2
from kqprefill.models.family import Family
from kqprefill.synthetic import SHAPES, SyntheticFile

COPIES = (
    4  # of a kind of layer, with weights of their own, that are multiplied in turn; fewer where these are larger than
)
COPIES_BYTES = 16 << 30
LARGEST_HEAD = 256  # that flash attention takes
# Matrices that share their input.
TOGETHER = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha", "attn_q_a", "attn_kv_a_mqa"),
    ("attn_q_b",),
    ("ssm_in_z", "ssm_in_xbc", "ssm_in_dt", "shortconv_in_proj"),
    ("attn_output", "ssm_out", "shortconv_out_proj"),
    ("ffn_gate", "ffn_up"),
    ("ffn_down",),
    ("ffn_gate_shexp", "ffn_up_shexp"),
    ("ffn_down_shexp",),
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_down_exps",),
    ("inp_gate",),
    ("proj",),
)
REPLAYS = 10  # of a burst
SUSTAINED_SECONDS, MEASURED_SECONDS = (
    1.5,
    0.5,
)  # how long work goes on without a pause, and over how much of it is measured

Work: TypeAlias = Callable[[], object]


def random(*shape: int) -> torch.Tensor:
    """Normal values of weights' usual size, bf16, on the GPU; zeros would draw less power."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def capture(work: Work) -> torch.cuda.CUDAGraph:
    """The work's launches as a CUDA graph, ready to replay."""
    with torch.cuda.stream(torch.cuda.Stream()):  # what a first call sets up must not be captured
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay_ms(graph)
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, count: int = 1) -> float:
    """Milliseconds of one replay, of `count` without a pause."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / count


def burst_ms(work: Work) -> float:
    """Milliseconds of the work, from rest: the median of some replays."""
    graph = capture(work)
    return sorted(replay_ms(graph) for _ in range(REPLAYS))[REPLAYS // 2]


def sustained_ms(work: Work) -> float:
    """Milliseconds of the work when the GPU has long been busy with it."""
    graph = capture(work)
    start = time.monotonic()
    while time.monotonic() - start < SUSTAINED_SECONDS - MEASURED_SECONDS:
        latest = replay_ms(graph, 4)
    return replay_ms(graph, max(4, int(MEASURED_SECONDS * 1e3 / latest)))


def weight_shapes(family: Family, index: int) -> list[tuple[int, ...]]:
    """Of a layer's matrices, those that share their input as one: [rows, columns], or [experts, columns, rows]."""
    shapes: list[tuple[int, ...]] = []
    for names in TOGETHER:
        tensors = [weight.tensor for name in names if (weight := family.blocks[index].get(name)) is not None]
        if tensors:
            experts, rows, columns = tensors[0].shape[:-2], sum(t.shape[-2] for t in tensors), tensors[0].shape[-1]
            shapes.append((*experts, columns, rows) if experts else (rows, columns))
    if isinstance(family, DeepSeek2):  # in either form of the file: from latent rows to keys and values
        latent = family.latent
        shapes.append((latent.heads * (latent.key_dim + latent.value_dim), latent.rank))
    return shapes


@dataclass(frozen=True)
class Attention:
    """A kind of layer's: the sizes of heads, and the window, None for none."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None

    def seen(self, tokens: int) -> int:
        """Pairs of a query and a key that it sees."""
        window = min(tokens, self.window or tokens)
        return window * (window + 1) // 2 + (tokens - window) * window


class Layers:
    """Every kind of a model's layers."""

    def __init__(self, name: str) -> None:
        self.shape, family = SHAPES[name], read_model(SyntheticFile.named(name))
        layers = range(family.config.block_count)
        self.heads = family.config.head_count
        self.linear_kinds = Counter(tuple(weight_shapes(family, index)) for index in layers)
        self.attention_kinds = Counter(filter(None, (attention_of(family, index) for index in layers)))

    def operations(self, tokens: int) -> int:
        """Floating-point operations of all layers' linears."""
        times = {2: 1, 3: self.shape.used}  # that a token passes a matrix, or matrices of a stack
        every = [(sizes, count) for kind, count in self.linear_kinds.items() for sizes in kind]
        return 2 * tokens * sum(count * times[len(sizes)] * math.prod(sizes[-2:]) for sizes, count in every)

    def linears(self, kind: tuple[tuple[int, ...], ...], tokens: int, eight_bit: bool = False) -> tuple[Work, int]:
        """All products of a kind of layer, of bf16 operands or of e4m3 ones, and of how many layers with weights of
        their own."""
        shape, dtype = self.shape, torch.float8_e4m3fn if eight_bit else torch.bfloat16
        copies = max(1, min(COPIES, COPIES_BYTES // sum(2 * math.prod(sizes) for sizes in kind)))
        weights = [[random(*sizes).to(dtype) for sizes in kind] for _ in range(copies)]
        # Stacks of experts take a row for each token and each expert that it goes to, sorted by expert.
        rows = {2: tokens, 3: tokens * shape.used}
        inputs = [random(rows[len(s)], s[1]).to(dtype) for s in kind]
        chosen = torch.rand(tokens, max(1, shape.experts), device="cuda").topk(shape.used).indices.flatten()
        ends = torch.bincount(chosen, minlength=shape.experts).cumsum(0).to(torch.int32)
        grouped_mm, one = getattr(torch, "_grouped_mm", None) or F.grouped_mm, torch.ones((), device="cuda")

        def multiply(x: torch.Tensor, w: torch.Tensor) -> None:
            if w.dim() == 3:
                grouped_mm(x, w, offs=ends)
            elif eight_bit:
                torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
            else:
                torch.matmul(x, w.t())

        def work() -> None:
            for layer in weights:
                for x, w in zip(inputs, layer):
                    multiply(x, w)

        return work, copies

    def attention(self, kind: Attention, tokens: int) -> tuple[Work, float]:
        """Causal attention with the nearest heads that flash attention takes, and how much of its operations those of
        this kind of layer are."""
        wide = max(kind.head_dim, kind.value_dim)
        parts = -(-wide // LARGEST_HEAD)  # heads for one
        size = -(-wide // parts // 8) * 8
        q = random(1, parts * self.heads, tokens, size)
        k, v = (random(1, parts * kind.kv_heads, tokens, size) for _ in range(2))
        share = (kind.head_dim + kind.value_dim) / (2 * parts * size)
        share *= kind.seen(tokens) / Attention(1, 1, 1, None).seen(tokens)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), share


def attention_of(family: Family, index: int) -> Attention | None:
    """A layer's; None for a recurrence."""
    state = family.layer_states[index]
    if isinstance(state, SharedKeysValues):
        return attention_of(family, state.layer)
    if isinstance(state, KeysValues):
        return Attention(state.heads, *family.head_dims(index), state.window)
    if isinstance(state, Latent):
        return Attention(family.config.head_count, *family.head_dims(index), None)
    return None


def measure(layers: Layers, tokens: int) -> dict[str, dict[str, float]]:
    """Each column's figures for a prompt of so many tokens."""

    def linears(milliseconds: Callable[[Work], float], eight_bit: bool = False) -> float:
        total = 0.0
        for kind, count in layers.linear_kinds.items():
            work, copies = layers.linears(kind, tokens, eight_bit)
            total += milliseconds(work) / copies * count
        return total

    def attention(milliseconds: Callable[[Work], float]) -> float:
        total = 0.0
        for kind, count in layers.attention_kinds.items():
            work, share = layers.attention(kind, tokens)
            total += milliseconds(work) * share * count
        return total

    def column(linear_ms: float, attention_ms: float) -> dict[str, float]:
        return {
            "linear_ms": linear_ms,
            "attention_ms": attention_ms,
            "tflops": layers.operations(tokens) / linear_ms / 1e9,
            "tokens_per_second": tokens / (linear_ms + attention_ms) * 1e3,
        }

    held = attention(sustained_ms)
    columns = {"burst": column(linears(burst_ms), attention(burst_ms))}
    columns["sustained"] = column(linears(sustained_ms), held)
    if not layers.shape.experts:
        columns["8-bit"] = column(linears(sustained_ms, eight_bit=True), held)
    return columns


def card_rates() -> dict[str, float]:
    """The card's own: copies in GB/s (reads and writes counted on the device), and its best bf16 product in TFLOP/s."""
    source, target = (torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    host, part = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), target[: 1 << 30]
    a, b = random(8192, 8192), random(8192, 8192)
    return {
        "copy_gb_per_s": 2 * source.numel() / burst_ms(lambda: target.copy_(source)) / 1e6,
        "host_to_device_gb_per_s": host.numel() / burst_ms(lambda: part.copy_(host, non_blocking=True)) / 1e6,
        "gemm_8192_tflops": 2 * 8192**3 / burst_ms(lambda: a @ b) / 1e9,
    }


def main() -> None:
    """Measure, print a line a length, and write the figures where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("lengths", nargs="?", default="16,128,512,2048,8192,32768", help="T,T,…")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = {"device": torch.cuda.get_device_name(), "shape": options.shape, **card_rates()}
    print(", ".join(f"{key} {value if isinstance(value, str) else round(value)}" for key, value in report.items()))
    layers, rows = Layers(options.shape), []
    for tokens in map(int, options.lengths.split(",")):
        columns = measure(layers, tokens)
        rows.append({"tokens": tokens, **columns})
        parts = [
            f"{name} {figures['tokens_per_second']:.0f} tok/s (linears {figures['linear_ms']:.2f} ms, "
            f"{figures['tflops']:.0f} TFLOP/s; attention {figures['attention_ms']:.2f} ms)"
            for name, figures in columns.items()
        ]
        print(f"T={tokens}: {'; '.join(parts)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
