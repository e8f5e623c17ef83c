"""What matrices are multiplied as: exactly as the file has them, or both operands in int8.

With "int8" a matrix W and its inputs x are rotated first: each 128 columns (the last ones filled up with zeros) are
multiplied by the orthogonal Hadamard matrix of 128, which spreads what is large over all of them and leaves W · x as it
is. Then a row of W has one scale, and a token of x has one: their largest magnitude / 127. Both are rounded to integers
of -127 to 127, half to even, and multiplied and summed exactly. So a token's scale depends on that token alone.
QuaRot (arXiv 2404.00456) rotates so; llama.cpp multiplies x in int8, too, by blocks of 32 (ggml's Q8_0 and Q8_K).

Experts in int8 give several rows for each token. These are rounded once more before they are added up, much as ggml's
Q8_0 is: a row is cut into blocks of 16 columns, whose values become integers of -127 to 127, in 127ths of the largest
magnitude among them. Of each 32 columns the first block has 0 to 7 and 16 to 23, and the second the others, as these
lie together in Hopper's kernels.

Which matrices: the large ones of layers, but for what costs little and errs most (numbers: docs/performance-int8.md).
- Matrices in float formats stay exact: llama.cpp does not round what these are multiplied by to 8 bits, either.
- The first layer stays exact: its error goes through everything after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from ..gguf.types import GGML
from .weights import Weight

Precision: TypeAlias = Literal["exact", "int8"]

ROTATED = 128  # columns that are rotated together
OUTPUT_BLOCK = 16  # columns of experts' outputs that are rounded together

# The large matrices of layers, by their GGUF names between `blk.N.` and `.weight`; those of experts end in _exps. The
# output matrix, routers and the small matrices that steps, decays and gates come from stay exact.
_INT8 = frozenset(
    "attn_q attn_k attn_v attn_qkv attn_output attn_gate attn_q_a attn_q_b attn_kv_a_mqa ffn_gate ffn_up ffn_down "
    "ffn_gate_exps ffn_up_exps ffn_gate_up_exps ffn_down_exps ffn_gate_shexp ffn_up_shexp ffn_down_shexp "
    "ffn_gate_chexps ffn_up_chexps ffn_down_chexps ssm_in ssm_out shortconv.in_proj shortconv.out_proj".split()
)
_FLOATS = frozenset([GGML.F32, GGML.F16, GGML.BF16])


def norms_for_int8(layer: Iterable[Weight]) -> set[str]:
    """Of a layer's vectors, those that may be norms whose outputs nobody reads but matrices in int8: all, where all
    matrices are; the norm before attention, where only the networks have others (routers) and a norm of their own."""
    exact, vectors = [], {}
    for weight in layer:
        part = weight.name.removesuffix(".weight").split(".", 2)[-1]
        if not weight.is_matrix:
            vectors[part] = weight.name
        elif not takes_int8(weight):
            exact.append(part)
    if not exact:
        return set(vectors.values())
    apart = vectors.keys() & {"ffn_norm", "post_attention_norm"}
    of_networks = all(part.startswith("ffn_") for part in exact)
    return {vectors["attn_norm"]} if apart and of_networks and "attn_norm" in vectors else set()


def takes_int8(weight: Weight) -> bool:
    """Whether a matrix, or a part of one ("blk.1.attn_qkv.weight[attn_k]"), is multiplied in int8 where a model is
    opened so."""
    block, _, name = weight.name.partition("[")[0].removesuffix(".weight").partition(".")
    layer, _, name = name.partition(".")
    return block == "blk" and layer != "0" and name in _INT8 and weight.tensor.type not in _FLOATS
