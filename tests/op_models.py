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
