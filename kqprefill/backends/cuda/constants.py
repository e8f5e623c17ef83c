"""Numbers that the host and the kernels must agree on. Every program is compiled with all of them as defines, so that a
change here changes both sides."""

from __future__ import annotations

from ...models.precision import OUTPUT_BLOCK, ROTATED

TILE_ROWS = 32  # rows of a tile of quantised weights (kernels/quants/common.cuh)
OPERAND_GROUP = 64  # columns that an operand is padded to and permuted within (kernels/include/operand.cuh)
MAX_HEAD_DIM = 512  # that rope.cu and the attention kernels take
MOST_EXPERTS = 1024  # of a layer (experts.cu)
MOST_USED_EXPERTS = 32  # by a token
ENTRIES_AT_ONCE = 512  # tokens' copies that a warp counts and places by expert
DELTA_CHUNK = 64  # positions of a sequence that Gated DeltaNet takes at a time (kernels/include/chunks.cuh)
ALTUP_STREAMS = 4  # residual streams of Gemma 3n (altup.cu)
SHARED_ROW = 2048  # columns of a row of the residual stream that shares a block with another (experts.cu)
MOST_EXPERT_GROUPS = 32  # that experts are chosen from

# The activations of feed-forward networks, by the numbers that the kernels are told (kernels/include/activation.cuh;
# the last is of networks without a gate: kernels/activations.cu).
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2, "relu_squared": 3}

# Threads of a block: the define, its value, and the kernels that are launched with so many.
_THREADS = {
    "NORM_THREADS": (
        256,
        "rms_norm biased_norm rms_norm_in_place cast add_rms_norm add_norm_of_norms row_factors pool store_gates "
        "multiply_gates",
    ),
    "PER_LAYER_THREADS": (256, "join_embeddings gate_embeddings"),
    "ROPE_TABLE_THREADS": (256, "rope_table"),
    "ROTATE_THREADS": (256, "rotate_qkv rotate_and_norm"),
    "COPY_THREADS": (128, "copy_rows gather gather_shares"),
    "SINGLE_THREAD": (1, "weight_scale divide_scale square_scale smaller_scale"),
    "LATENT_THREADS": (256, "latent_rows latent_queries latent_heads latent_values"),
    "ACTIVATE_THREADS": (256, "activate_halves cast_rows add_rows"),
    "OUTPUT_SCALE_THREADS": (256, "output_scale"),
    "HEAD_THREADS": (1024, "finish_logits rank"),
    "EXPERT_THREADS": (256, "route route_biased combine combine_rms_norm"),
    "COUNT_THREADS": (32, "count place"),
    "ARRANGE_THREADS": (MOST_EXPERTS, "arrange"),
    "WEIGHT_THREADS": (256, "repack dequantize embed decode_transposed measure"),
    "INT8_THREADS": (256, "make_int8 round_rows rms_norm_rounded combine_rms_norm_rounded measure_int8"),
    "SQUARES_THREADS": (512, "add_squares add_float_squares add_expert_squares"),
    "DELTA_INPUT_THREADS": (128, "delta_inputs delta_output"),
    "ALTUP_THREADS": (
        256,
        "altup_streams altup_predict altup_correct altup_merge scale_rows sparse_gates",
    ),
    "KDA_THREADS": (256, "kda_rates kda_scan kda_output"),
    "MAMBA_THREADS": (128, "mamba_scales mamba_steps mamba_inputs mamba_output"),
    "CONVOLUTION_THREADS": (256, "convolution_scale convolution_inputs convolve"),
}
THREADS = {kernel: threads for threads, kernels in _THREADS.values() for kernel in kernels.split()}

SHARED_DEFINES = {
    "TILE_ROWS": TILE_ROWS,
    "OPERAND_GROUP": OPERAND_GROUP,
    "ROTATED": ROTATED,
    "OUTPUT_BLOCK": OUTPUT_BLOCK,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "SHARED_ROW": SHARED_ROW,
    "MOST_EXPERTS": MOST_EXPERTS,
    "MOST_USED_EXPERTS": MOST_USED_EXPERTS,
    "ENTRIES_AT_ONCE": ENTRIES_AT_ONCE,
    "MOST_EXPERT_GROUPS": MOST_EXPERT_GROUPS,
    "DELTA_CHUNK": DELTA_CHUNK,
    "ALTUP_STREAMS": ALTUP_STREAMS,
    **{f"ACTIVATION_{name.upper()}": number for name, number in ACTIVATIONS.items()},
    **{name: threads for name, (threads, _) in _THREADS.items()},
}
