"""Small models of many shapes, by whose layers the ops are tested."""

from gguf.constants import GGMLQuantizationType as GGML

from kqprefill.synthetic import Shape


def shape(architecture, hidden, heads, kv_heads, head_dim, ffn, vocab, **more):
    return Shape(architecture, more.pop("layers", 1), hidden, heads, kv_heads, head_dim, ffn, vocab, 4096, 1e4, **more)


DELTA = {
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.state_size": 64,
    "ssm.inner_size": 256,
    "ssm.conv_kernel": 4,
    "full_attention_interval": 4,
    "rope.dimension_sections": [11, 11, 10, 0],
}
LAYERS = {
    "attention.sliding_window_pattern": [True, False, True, False],
    "attention.head_count_kv": [2, 1, 2, 1],
    "attention.key_length_swa": 64,
    "attention.value_length_swa": 64,
}
EMBEDDINGS = {"attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 96}
OPTIONAL = r"blk\.[02]\.attn_v\.weight|blk\.\d\.layer_output_scale\.weight"  # others' keys are values, too
MIX = (GGML.Q4_K, GGML.F16, GGML.Q5_1)  # super-blocks, single weights, blocks of 32
MODELS = {
    "llama, no grouping": (shape("llama", 256, 4, 4, 64, 512, 160), GGML.Q4_K),
    "llama, 8 heads of 96 to one": (shape("llama", 256, 8, 1, 96, 256, 161), GGML.Q3_K),
    "qwen3, 8 heads to one": (shape("qwen3", 512, 8, 1, 128, 768, 521), GGML.Q6_K),
    "qwen3, heads of 80": (shape("qwen3", 256, 16, 8, 80, 256, 160), GGML.Q2_K),
    "qwen3, heads of 192": (shape("qwen3", 256, 4, 2, 192, 256, 160), GGML.Q5_K),
    "qwen3, heads of 256": (shape("qwen3", 256, 3, 1, 256, 256, 160), GGML.Q8_0),
    "qwen2, biases": (shape("qwen2", 256, 6, 2, 64, 512, 333), GGML.Q5_0),
    "gemma3, window": (shape("gemma3", 256, 4, 2, 64, 512, 160, layers=6, window=50), GGML.IQ4_XS),
    "no multiple of anything": (shape("llama", 100, 3, 3, 20, 77, 33), GGML.F32),
    "rows of 32s": (shape("qwen3", 96, 6, 3, 32, 160, 47), GGML.Q4_0),
    "formats of differing units": (
        shape("qwen3", 256, 4, 2, 64, 512, 160),
        lambda name, _: MIX[sum(name.encode()) % 3],
    ),
    "gate and up of two types": (
        shape("llama", 512, 4, 2, 64, 768, 160),
        lambda name, _: {"ffn_gate": GGML.Q4_K, "ffn_up": GGML.Q6_K, "attn_v": GGML.F32}.get(name, GGML.Q3_K),
    ),
    "an odd number of short units beside long ones": (
        shape("qwen3", 384, 6, 3, 64, 320, 160),
        lambda name, _: {"attn_k": GGML.F16, "ffn_gate": GGML.BF16, "ffn_down": GGML.F32}.get(name, GGML.Q8_0),
    ),
    "recurrence, gates": (
        shape("qwen35", 256, 4, 2, 64, 512, 160, layers=4, more={**DELTA, "full_attention_interval": 2}),
        GGML.Q4_K,
    ),
    "recurrence, heads of 128": (
        shape(
            "qwen35", 256, 2, 1, 256, 512, 160, layers=2, more=DELTA | {"ssm.state_size": 128, "ssm.inner_size": 512}
        ),
        GGML.Q8_0,
    ),
    "gemma 4, heads of 512 and 64": (
        shape("gemma4", 256, 4, 2, 512, 512, 160, layers=2, tied=True, window=50, more=LAYERS, optional=OPTIONAL),
        GGML.Q4_K,
    ),
    "gemma 4, heads of 320, embeddings by layer": (
        shape(
            "gemma4",
            256,
            4,
            2,
            320,
            512,
            160,
            layers=4,
            tied=True,
            window=50,
            more=LAYERS | EMBEDDINGS,
            optional=OPTIONAL,
        ),
        GGML.Q5_0,
    ),
    "wide": (shape("qwen3", 2560, 8, 2, 128, 4096, 1000), GGML.Q4_K),
}

# Biases, sinks, and an activation of its own.
GPT_OSS = shape("gpt-oss", 512, 8, 2, 64, 192, 160, experts=16, used=3, layers=2, window=50)
# A network beside the experts, and a router with an input of its own.
GEMMA = shape(
    "gemma4",
    512,
    4,
    2,
    128,
    256,
    160,
    tied=True,
    experts=16,
    used=3,
    layers=2,
    window=50,
    more=LAYERS,
    optional=OPTIONAL,
)
EXPERTS = shape("qwen3moe", 512, 4, 2, 128, 256, 160, experts=16, used=3, layers=2)


def latent(joined, hidden, heads, sizes, **more):
    """Two layers of latent attention without experts. sizes: ranks of queries (0: none) and of keys and values,
    elements of a head that are not rotated, that are, and of a value. joined: one matrix makes keys and values."""
    query_rank, rank, still, rotary, value = sizes
    suffix = "" if joined else "_mla"
    metadata = {
        "attention.kv_lora_rank": rank,
        f"attention.key_length{suffix}": still + rotary,
        f"attention.value_length{suffix}": value,
        "rope.dimension_count": rotary,
        "leading_dense_block_count": 2,
        "expert_shared_count": 1,
        **more.pop("metadata", {}),
    }
    if query_rank:
        metadata["attention.q_lora_rank"] = query_rank
    others = {"layers": 2, "experts": 4, "used": 1, "more": metadata, **more}
    return shape("deepseek2", hidden, heads, 1, rank + rotary, 320, 160, **others)


_LATENT_BIASES = r"blk\.\d\.attn_(q|q_a|q_b|kv_a_mqa)\.bias"
TEMPERATURES = {"attention.temperature_scale": 0.1, "attention.temperature_length": 64}
# Heads of 192 and 128, and odd ones.
LATENT_MODELS = {
    "as V2-Lite": (latent(False, 256, 4, (0, 512, 128, 64, 128)), GGML.Q4_K),
    "as V3, with more heads than a block has": (latent(False, 256, 10, (256, 512, 128, 64, 128), yarn=4.0), GGML.Q8_0),
    "one matrix": (latent(True, 256, 4, (0, 256, 128, 64, 128)), GGML.Q4_K),
    "one matrix of a query's rank, temperatures": (
        latent(True, 256, 3, (96, 64, 24, 8, 32), metadata=TEMPERATURES, optional=_LATENT_BIASES),
        GGML.Q5_0,
    ),
    "no multiple of anything": (latent(False, 100, 5, (36, 40, 24, 8, 20), optional=_LATENT_BIASES), GGML.F32),
    "no multiple of four": (latent(False, 96, 3, (0, 42, 22, 6, 18)), GGML.F16),
    "values wider than keys": (latent(False, 96, 2, (32, 64, 32, 32, 256)), GGML.Q8_0),
}
