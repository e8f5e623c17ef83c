"""What small models of each family need beside what all have."""

EXPERTS = (
    "qwen2moe qwen3moe olmoe gpt-oss glm4moe qwen3vlmoe qwen35moe qwen3next deepseek2 mistral4 minimax-m2 "
    "ernie4_5-moe granitemoe".split()
)  # whose layers have experts


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
    if architecture in ("deepseek2", "mistral4"):
        latent = {"attention.kv_lora_rank": 32, "attention.q_lora_rank": 32, "rope.dimension_count": 8}
        heads = {"attention.key_length_mla": 40, "attention.value_length_mla": 16}
        experts = {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2}
        return latent | heads | experts
    if architecture == "gemma4":
        windowed = [True, True, False, True, False, True, False]
        return {"attention.sliding_window_pattern": windowed, "embedding_length_per_layer_input": 32}
    return {}
