"""What small models of each family need beside what all have."""

EXPERTS = (
    "qwen2moe qwen3moe olmoe gpt-oss glm4moe qwen3vlmoe qwen35moe qwen3next deepseek2 mistral4 minimax-m2 "
    "ernie4_5-moe granitemoe lfm2moe nemotron_h_moe granitehybrid llama4 hunyuan-moe phimoe kimi-linear".split()
)  # whose layers have experts

MAMBA = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
KV_HEADS, FEED_FORWARD = [0, 2, 0, 0, 0, 2, 0], [0, 0, 64, 0, 64, 0, 0]  # of each layer of a hybrid


def more_metadata(architecture):
    """What `architecture`'s files say beside what all files do, for a small model with heads of 16 and 7 layers or
    less."""
    if architecture in ("glm4moe", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next"):
        more = {"expert_shared_feed_forward_length": 64} if "moe" in architecture or "next" in architecture else {}
        if architecture != "glm4moe":
            more["rope.dimension_sections"] = [3, 3, 2, 0]
        if architecture.startswith(("qwen35", "qwen3next")):
            sizes = {"conv_kernel": 4, "state_size": 32, "group_count": 2, "time_step_rank": 4, "inner_size": 128}
            more |= {f"ssm.{key}": size for key, size in sizes.items()}
        return more
    if architecture == "qwen2vl":
        return {"rope.dimension_sections": [3, 3, 2, 0]}
    if architecture in ("nemotron_h", "nemotron_h_moe", "granitehybrid", "falcon-h1"):
        return (
            MAMBA
            | {
                "nemotron_h": {"attention.head_count_kv": KV_HEADS, "feed_forward_length": FEED_FORWARD},
                "nemotron_h_moe": {
                    "attention.head_count_kv": KV_HEADS,
                    "feed_forward_length": FEED_FORWARD,
                    "expert_shared_feed_forward_length": 64,
                    "moe_latent_size": 32,
                },
                "granitehybrid": {"attention.head_count_kv": KV_HEADS, "expert_shared_feed_forward_length": 64},
                "falcon-h1": {},
            }[architecture]
        )
    if architecture in ("lfm2", "lfm2moe"):
        more = {"attention.head_count_kv": KV_HEADS, "shortconv.l_cache": 3, "attention.sliding_window": 0}
        return more | ({"leading_dense_block_count": 1} if architecture == "lfm2moe" else {})
    if architecture == "llama4":
        return {"interleave_moe_layer_step": 2, "attention.sliding_window": None}
    if architecture in ("command-r", "cohere2", "starcoder2"):
        return {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5}
    if architecture == "kimi-linear":
        recurrence = {"kda.head_dim": 32, "ssm.conv_kernel": 4, "attention.head_count_kv": KV_HEADS}
        return more_metadata("deepseek2") | recurrence | {"attention.q_lora_rank": 0}
    if architecture in ("deepseek2", "mistral4"):
        latent = {"attention.kv_lora_rank": 32, "attention.q_lora_rank": 32, "rope.dimension_count": 8}
        heads = {"attention.key_length_mla": 40, "attention.value_length_mla": 16}
        experts = {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2}
        return latent | heads | experts
    if architecture == "gemma3n":
        more = {"activation_sparsity_scale": [1.5] * 3 + [float("-inf")] * 4, "attention.shared_kv_layers": 0}
        return more_metadata("gemma4") | more | {"attention.sliding_window_pattern": [True, True, False] * 2 + [True]}
    if architecture == "gemma4":
        windowed = [True, True, False, True, False, True, False]
        return {"attention.sliding_window_pattern": windowed, "embedding_length_per_layer_input": 32}
    return {}
