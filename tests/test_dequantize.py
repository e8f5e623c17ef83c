"""Block formats, bit for bit: the host's decoding against the gguf package, the kernels' against the host's."""

from dataclasses import replace
import struct
import subprocess
import sys

from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from conftest import relative_error
from kqprefill.gguf import dequantize
from kqprefill.gguf.dequantize import SUPPORTED
from kqprefill.synthetic import pool

CODEBOOKS = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0".split()
FORMATS = sorted(SUPPORTED, key=lambda t: t.name)
QUANTISED = [t for t in FORMATS if GGML_QUANT_SIZES[t][0] > 1]


def random_blocks(kind, n, rng):
    """Blocks of random bits, but with finite scales: every bit pattern of the integers occurs."""
    raw = rng.integers(0, 256, (n, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    real = pool(kind)
    if kind.name in CODEBOOKS:  # these blocks are random already
        return real[rng.integers(0, len(real), n)]
    sound = real[rng.integers(0, len(real), n)]
    half_at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        kind.name, (0, 2) if kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    )
    width = 4 if kind == GGML.Q8_K else 2
    for at in half_at:
        raw[:, at : at + width] = sound[:, at : at + width]
        if width == 2:  # a few subnormal scales too
            raw[: n // 8, at : at + 2] = rng.integers(1, 0x400, (n // 8, 1), dtype=np.uint16).view(np.uint8)
    return raw


def rows_of(kind, rows, columns, rng):
    block_elements, _block_bytes = GGML_QUANT_SIZES[kind]
    if block_elements == 1:
        return pool(kind)[rng.integers(0, len(pool(kind)), rows * columns)].reshape(rows, -1)
    return random_blocks(kind, rows * columns // block_elements, rng).reshape(rows, -1)


@pytest.mark.parametrize("kind", [t for t in FORMATS if t not in (GGML.Q8_K, GGML.Q1_0)], ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (300, 768), (33, 8192)], ids=str)
def test_equals_the_gguf_package(kind, shape, rng):
    raw = rows_of(kind, *shape, rng)
    got = dequantize(raw, kind)
    assert got.shape == shape and got.dtype == np.float32
    assert np.array_equal(got.view(np.uint32), np.asarray(quants.dequantize(raw, kind), np.float32).view(np.uint32))


def test_q8_k_equals_ggmls_formula(rng):
    raw = rows_of(GGML.Q8_K, 3, 512, rng)
    expected = []
    for block in raw.reshape(-1, 292):
        (d,) = struct.unpack("<f", block[:4].tobytes())
        expected.append(np.float32(d) * block[4:260].view(np.int8).astype(np.float32))
    assert np.array_equal(dequantize(raw, GGML.Q8_K), np.concatenate(expected).reshape(3, 512))


@pytest.fixture(scope="module")
def gpu():
    from kqprefill.backends.cuda.device.gpu import Gpu

    gpu = Gpu(0)
    yield gpu
    gpu.close()


def test_types_are_those_of_the_gguf_package():
    """They are read from its constants without importing it; both must work as each other's keys."""
    code = """
from kqprefill.gguf.types import GGML, GGML_QUANT_SIZES
import gguf.constants as theirs
assert GGML is not theirs.GGMLQuantizationType
assert [(t.name, int(t)) for t in GGML] == [(t.name, int(t)) for t in theirs.GGMLQuantizationType]
pairs = [(own, t) for own, t in zip(GGML, theirs.GGMLQuantizationType) if own in GGML_QUANT_SIZES]
assert all(GGML_QUANT_SIZES[t] == theirs.GGML_QUANT_SIZES[own] for own, t in pairs)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS, ids=lambda t: t.name)
@pytest.mark.parametrize("rows,columns", [(1, 256), (7, 512), (129, 768), (5, 96), (3, 33)])
def test_kernels_equal_the_host(gpu, kind, rows, columns, rng):
    """embed gives the weights in float32, bit for bit; dequantize gives halves of scale * weight, zero-padded."""
    from kqprefill.backends.cuda.device.arrays import DeviceArray
    from kqprefill.backends.cuda.device.launcher import Launcher
    from kqprefill.backends.cuda.kernel_set import kernel_set_of
    from kqprefill.backends.cuda.programs import weight_program
    from kqprefill.backends.cuda.weights.matrix import Matrix
    from kqprefill.backends.cuda.weights.staging import repack

    block_elements, _block_bytes = GGML_QUANT_SIZES[kind]
    if columns % block_elements:
        pytest.skip(f"{kind.name} has no rows of {columns}")
    raw = rows_of(kind, rows, columns, rng)
    expected = dequantize(raw, kind)
    ids = rng.integers(0, rows, 2 * rows).astype(np.int32)
    scale = np.array([2.0**7], np.float32)
    stride = -(-columns // 64) * 64
    embedded = np.empty((len(ids), columns), np.float32)
    halves = np.empty((rows, stride), np.float16)
    matrix = Matrix("test", kind, 0, rows, columns)
    tiles = np.empty(matrix.nbytes, np.uint8)
    launcher = Launcher(gpu, kernel_set_of(gpu.capability).target)
    buffers = [gpu.allocate(a.nbytes, "test") for a in (raw, ids, scale, tiles, embedded, halves)]
    d_raw, d_ids, d_scale, d_tiles, d_embedded, d_halves = (
        DeviceArray(int(b.handle), a.dtype, a.shape)
        for b, a in zip(buffers, (raw, ids, scale, tiles, embedded, halves))
    )
    for to, array in ((d_raw, raw), (d_ids, ids), (d_scale, scale)):
        gpu.upload(to.address, array)
    for to in (d_tiles, d_embedded, d_halves):
        gpu.upload(to.address, np.full(to.nbytes, 0xFF, np.uint8))  # NaN: an element not written shows
    matrix = replace(matrix, address=d_tiles.address)
    repack(launcher, matrix, 0, d_raw)
    launcher.launch(
        weight_program(kind),
        "embed",
        grid=len(ids),
        weights=d_tiles,
        units=matrix.units,
        columns=columns,
        tokens=d_ids,
        factor=1.0,
        out=d_embedded,
    )
    launcher.launch(
        weight_program(kind),
        "dequantize",
        grid=-(-rows * stride // 16 // 256),
        weights=d_tiles,
        units=matrix.units,
        first=0,
        rows=rows,
        out=d_halves,
        stride=stride,
        first_out=0,
        gated=0,
        scale=d_scale,
    )
    gpu.download(embedded, d_embedded.address)
    gpu.download(halves, d_halves.address)
    for buffer in buffers:
        buffer.close(gpu.stream)
    assert np.array_equal(embedded.view(np.uint32), expected[ids].view(np.uint32))
    columns_of = np.arange(stride).reshape(-1, 4, 4, 2, 2).transpose(0, 2, 3, 1, 4).reshape(-1)  # operand.cuh's order
    halves = halves[:, np.argsort(columns_of)]
    # A weight is d * q + c with d and c rounded to halves: off by their last places, and by its own.
    assert relative_error(expected * scale, halves[:, :columns]) < 6e-4
    assert not halves[:, columns:].any()
