"""The bound that a mixture of experts is judged by: PyTorch's grouped GEMM in bf16 over the same routing (each token to `used`
of `experts` at random), Qwen3-30B-A3B's shape, and the rest of a layer as gpu_ceilings.py times it. usage: grouped.py [T]"""

import sys

import torch
import torch.nn.functional as F

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, USED, WIDTH = 48, 2048, 32, 4, 128, 128, 8, 768


def milliseconds(run, repetitions=10):
    """Of one call: the median of several, each on its own."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repetitions // 2]


def main(tokens=8192):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(USED).indices.flatten()
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
    x, act = random(tokens * USED, HIDDEN), random(tokens * USED, WIDTH)
    gate_up, down = random(EXPERTS, HIDDEN, 2 * WIDTH), random(EXPERTS, WIDTH, HIDDEN)
    grouped = getattr(torch, "_grouped_mm", None) or F.grouped_mm
    experts = milliseconds(lambda: (grouped(x, gate_up, offs=ends), grouped(act, down, offs=ends)))
    h, qkv, o = (
        random(tokens, HIDDEN),
        random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        random(HIDDEN, HEADS * HEAD_DIM),
    )
    a = random(tokens, HEADS * HEAD_DIM)
    dense = milliseconds(lambda: (h @ qkv.t(), a @ o.t()))
    q, kv = random(1, HEADS, tokens, HEAD_DIM), random(1, KV_HEADS, tokens, HEAD_DIM)
    attention = milliseconds(lambda: F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True))
    flops = 2 * tokens * USED * 3 * HIDDEN * WIDTH
    total = LAYERS * (experts + dense + attention)
    print(
        f"T={tokens}: experts {LAYERS * experts:.1f} ms ({flops / experts / 1e9:.0f} TFLOP/s), q k v o {LAYERS * dense:.1f} ms, "
        f"attention {LAYERS * attention:.1f} ms; bound {tokens / total * 1e3:.0f} tok/s"
    )


main(*map(int, sys.argv[1:]))
