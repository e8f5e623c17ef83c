"""Random weights of any supported ggml type.

They are drawn from a pool of real blocks (Gaussian, sigma 0.02, quantised by ggml: block_pool.npz): a GPU computes
faster with zeros or constants than with real weights.
"""

from __future__ import annotations

from functools import cache
import mmap
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..gguf.model_file import nbytes_of
from ..gguf.types import GGML, GGML_QUANT_SIZES

_POOL_BLOCKS = 8192  # of a type that block_pool.npz does not have
_drawing = Lock()  # two devices' threads want the same tensors at once


def random_weights(shape: tuple[int, ...], kind: GGML, name: str) -> NDArray[np.uint8]:
    """A tensor's data, uint8 [..., row bytes]: blocks drawn from the pool; the weights of vectors and norms (F32) are
    spread about 1, or -1 where they are rates of decay, or little about 0 where they choose experts, of which all are
    used then; rope_freqs, which Gemma 4's files must have, let a quarter of the pairs turn.

    The same array for the same arguments, whichever thread asks.
    """
    with _drawing:
        return _drawn(shape, kind, name)


def forget_weights() -> None:
    """Have all that were made given back, once nobody uses them."""
    with _drawing:
        _drawn.cache_clear()


@cache
def _drawn(shape: tuple[int, ...], kind: GGML, name: str) -> NDArray[np.uint8]:
    if name == "rope_freqs":
        return np.where(np.arange(shape[0]) < shape[0] // 4, 1, 1e30).astype(np.float32).view(np.uint8)
    rng = np.random.default_rng([*shape, int(kind), *name.encode()])
    if shape[-1] == 1 or len(shape) == 1 or name.endswith("_norm"):
        center, spread = (0, 0.01) if name == "exp_probs_b" else (1, 0.1)
        vector = (center + spread * rng.standard_normal(shape, np.float32)).astype(np.float32)
        return (-vector if name.endswith("ssm_a") else vector).view(np.uint8)
    blocks, nbytes = pool(kind), nbytes_of(shape, kind)
    index = rng.integers(0, len(blocks), nbytes // GGML_QUANT_SIZES[kind][1], dtype=np.uint32)
    # Memory of its own pages, as a mapped file's, which a backend may lock.
    out = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    np.take(blocks, index, axis=0, out=out.reshape(-1, blocks.shape[1]))
    return out.reshape(*shape[:-1], nbytes_of(shape[-1:], kind))


@cache
def pool(kind: GGML) -> NDArray[np.uint8]:
    """Valid blocks of Gaussian weights of any supported type, uint8 [n, block bytes]."""
    with np.load(Path(__file__).with_name("block_pool.npz")) as stored:
        if kind.name in stored:
            return _uint8(stored[kind.name])
    if GGML_QUANT_SIZES[kind][0] > 1 and kind != GGML.Q8_K:
        return _random_blocks(kind, _POOL_BLOCKS)
    weights = 0.02 * np.random.default_rng(0).standard_normal((_POOL_BLOCKS, 256)).astype(np.float32)
    if kind == GGML.Q8_K:  # d, 256 int8, 16 sums of 16
        d = np.abs(weights).max(axis=1, keepdims=True) / 127
        q = np.rint(weights / d).astype(np.int8)
        sums = q.reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
        return np.concatenate([_uint8(d), _uint8(q), _uint8(sums)], axis=1)
    if kind == GGML.BF16:
        return _uint8((weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1, 1))
    return _uint8(weights.astype(np.float16 if kind == GGML.F16 else np.float32).reshape(-1, 1))


def _random_blocks(kind: GGML, n: int) -> NDArray[np.uint8]:
    """Blocks of a type that no Python package can quantise to, uint8 [n, block bytes].

    Their bits are random, and their scales such that the weights are as large as those of the other types.
    """
    rng, block_bytes = np.random.default_rng(int(kind)), GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    spread = {"Q1_0": 0.02, "TQ1_0": 0.02, "TQ2_0": 0.02, "IQ1_S": 3e-3, "IQ1_M": 3e-3, "IQ3_S": 1.5e-4}  # else 3e-4
    d = (spread.get(kind.name, 3e-4) * rng.uniform(0.7, 1.4, n)).astype(np.float16).view(np.uint16)
    if kind.name == "MXFP4":  # a byte e: the scale is 2^(e - 128)
        raw[:, 0] = rng.integers(117, 121, n)
    elif kind.name == "NVFP4":  # four scales, floats of 4 bits of exponent and 3 of mantissa
        raw[:, :4] = rng.integers(1, 0x28, (n, 4))
    elif kind.name == "IQ1_M":  # d's four nibbles are the top four bits of each of the four 16-bit words at the end
        words = raw[:, 48:].copy().view(np.uint16)
        nibbles = d[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        raw[:, 48:] = (words & 0x0FFF | nibbles << 12).astype(np.uint16).view(np.uint8)
    else:  # d is a half at the block's end or beginning
        at = block_bytes - 2 if kind.name.startswith("TQ") else 0
        raw[:, at : at + 2] = d[:, None].view(np.uint8)
    return raw


def _uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.view(np.uint8)
