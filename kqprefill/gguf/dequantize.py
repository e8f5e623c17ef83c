"""ggml blocks to float32 on the host. The `gguf` package decodes; it is given pieces of a size that it is fast at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
import os

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array
from .types import GGML, GGML_QUANT_SIZES

# What both backends can multiply by. Other ggml types are refused when the model is opened.
SUPPORTED = frozenset(
    GGML[name]
    for name in (
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K "
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0"
    ).split()
)

# gguf.quants works on 16 rows at a time, whatever their length. Rows of this many elements keep what it holds in the L2
# cache and make few calls of it: 2 to 14 times the speed that a matrix's own rows give (640 columns, 2 cores).
_ROW_ELEMENTS = 8192
# What one thread decodes at a time: one such call. (The main thread gives freed memory back to the system at once, and
# takes three times as long as another for what gguf.quants allocates: it decodes only what is smaller.)
_SLICE_ELEMENTS = 16 * _ROW_ELEMENTS


def dequantize(raw: NDArray[np.uint8], ggml_type: GGML) -> Float32Array:
    """Decode ggml blocks.

    raw: uint8 [..., row bytes], whole blocks in each row. Returns float32 [..., row elements], equal bit for bit to
    ggml's dequantize_row_* (through `gguf.quants.dequantize`; Q8_K and Q1_0, which that lacks, and Q8_0, for which it
    takes five times as long, after ggml's structs).
    """
    block_elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    shape = (*raw.shape[:-1], raw.shape[-1] // block_bytes * block_elements)
    flat = np.ascontiguousarray(raw).reshape(-1)
    if ggml_type == GGML.F32:
        return flat.view(np.float32).reshape(shape)
    out = np.empty(flat.size // block_bytes * block_elements, np.float32)
    step = _SLICE_ELEMENTS
    slices = [(at, min(at + step, out.size)) for at in range(0, out.size, step)]

    def decode(span: tuple[int, int]) -> None:
        begin, end = span
        piece = flat[begin // block_elements * block_bytes : end // block_elements * block_bytes]
        _decode_slice(piece, ggml_type, block_elements, block_bytes, out[begin:end])

    if len(slices) == 1:
        decode(slices[0])
    else:
        list(_pool().map(decode, slices))
    return out.reshape(shape)


@np.errstate(all="ignore")  # a damaged block's scales may overflow: the values say so, not NumPy on stderr
def _decode_slice(
    raw: NDArray[np.uint8], ggml_type: GGML, block_elements: int, block_bytes: int, out: Float32Array
) -> None:
    """Decode the blocks `raw`, uint8 [n * block_bytes], to `out`, float32 [n * block_elements]; any type but F32."""
    if ggml_type == GGML.F16:
        out[:] = raw.view(np.float16)
        return
    if ggml_type == GGML.Q8_K:  # struct block_q8_K { float d; int8_t qs[256]; int16_t bsums[16]; }
        blocks = raw.reshape(-1, block_bytes)
        d = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
        np.multiply(d, blocks[:, 4:260].view(np.int8), out=out.reshape(-1, block_elements))
        return
    if ggml_type == GGML.Q8_0:  # struct block_q8_0 { ggml_half d; int8_t qs[32]; }
        blocks = raw.reshape(-1, block_bytes)
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        np.multiply(d, blocks[:, 2:].view(np.int8), out=out.reshape(-1, block_elements))
        return
    if ggml_type == GGML.Q1_0:  # struct block_q1_0 { ggml_half d; uint8_t qs[16]; }: a bit is the sign
        blocks = raw.reshape(-1, block_bytes)
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
        out.reshape(-1, block_elements)[:] = np.where(bits, d, -d)
        return
    from gguf import quants  # late: a CUDA run decodes nothing but F32 vectors

    row_blocks = _ROW_ELEMENTS // block_elements
    whole = out.size // _ROW_ELEMENTS * _ROW_ELEMENTS
    split = whole // block_elements * block_bytes
    if whole:
        out[:whole] = quants.dequantize(raw[:split].reshape(-1, row_blocks * block_bytes), ggml_type).reshape(-1)
    if whole < out.size:
        out[whole:] = quants.dequantize(raw[split:].reshape(1, -1), ggml_type).reshape(-1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dequantize")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
