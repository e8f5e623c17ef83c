"""Products in int8 on CUDA against NumPy: what is made of weights and of operands, and what their products give, on
emulated kernels and on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

from emulator import EmulatedGpu, EmulatedMaps, Emulator, why_not
from kqprefill.backends.cuda.device.arrays import FLOAT16, FLOAT32, INT8, UINT8, DeviceArray
from kqprefill.backends.cuda.device.workspace import Workspace
from kqprefill.backends.cuda.gemm import int8
from kqprefill.backends.cuda.gemm.operand import BYTES, HALVES, MORE_ROWS, Groups, Operand, operand_positions
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.programs import NORM, rounded_norm, rounding
from kqprefill.backends.cuda.weights.matrix import matrix_of
from kqprefill.backends.cuda.weights.scales import Scales
from kqprefill.backends.cuda.weights.small_arrays import SmallArrays
from kqprefill.backends.cuda.weights.staging import unpack
from kqprefill.gguf import dequantize
from kqprefill.gguf.dequantize import SUPPORTED
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import SyntheticTensor

emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
DEVICES = [
    *(pytest.param((where, "portable"), marks=mark) for where, mark in (("host", emulated), ("gpu", pytest.mark.gpu))),
    *(pytest.param((where, "hopper"), marks=mark) for where, mark in (("host", emulated), ("gpu", pytest.mark.gpu))),
]
HADAMARD = np.ones((1, 1), np.float64)
while len(HADAMARD) < 128:
    HADAMARD = np.block([[HADAMARD, HADAMARD], [HADAMARD, -HADAMARD]])
HADAMARD /= np.sqrt(128)


class Device:
    """Kernels, memory and ways to multiply."""

    def __init__(self, where, kernels):
        if where == "gpu":
            from kqprefill.backends.cuda.backend import CudaBackend

            self.backend = CudaBackend(0, "auto" if kernels == "hopper" else kernels)
            kernel_set, self.gpu, self.launcher = self.backend.kernel_set, self.backend.gpu, self.backend.launcher
            self.work, maps = self.backend.work, self.backend.maps
            if kernels == "hopper" and kernel_set.name != "Hopper":
                pytest.skip("Hopper's kernels")
        else:
            capability, shared_memory = ((9, 0), 227 << 10) if kernels == "hopper" else ((8, 0), 99 << 10)
            self.backend, self.gpu, self.launcher = None, EmulatedGpu(capability, shared_memory), Emulator()
            kernel_set, self.work, maps = kernel_set_of(capability), Workspace(self.gpu), EmulatedMaps(self.gpu)
        self.small, self.maps, self.kernel_set = SmallArrays(self.gpu), maps, kernel_set
        self.scales = Scales(self.gpu, self.launcher, self.work, self.small)
        self.gemms = kernel_set.gemms(self.gpu, self.launcher, self.work, maps)

    def get(self, array):
        values = np.empty(array.shape, array.dtype)
        self.gpu.download(values, array.address)
        return values

    def poisoned(self, name, dtype, *shape):
        array = self.work.array(name, dtype, *shape)
        self.gpu.upload(array.address, np.full(array.nbytes, 0xFF, np.uint8))
        return array

    def matrix(self, name, shape, kind=GGML.F16, tensor=None):
        """(a matrix in int8, its rows in float32)"""
        tensor = tensor or SyntheticTensor(f"blk.0.{name}.weight", shape, kind)
        matrix = replace(matrix_of(tensor), int8=True)
        raw = np.ascontiguousarray(tensor.data).reshape(matrix.rows, -1)
        held = self.poisoned(f"{name} in int8", UINT8, matrix.nbytes)
        matrix = replace(matrix, address=held.address)
        scratch = self.work.array("scratch", UINT8, replace(matrix, int8=False).nbytes)
        padded = np.zeros(raw.nbytes + 4, np.uint8)  # a kernel reads up to three bytes more
        padded[: raw.nbytes] = raw.reshape(-1)
        rows = DeviceArray(self.work.upload("raw", padded).address, UINT8, raw.shape)
        unpack(self.launcher, matrix, 0, rows, scratch.address)
        return matrix, dequantize(raw, tensor.type)

    def exact(self, name, shape, kind):
        """(a matrix as a file has it, its rows in float32)"""
        tensor = SyntheticTensor(f"blk.1.{name}.weight", shape, kind)
        matrix = matrix_of(tensor)
        matrix = replace(matrix, address=self.poisoned(f"exact {name}", UINT8, matrix.nbytes).address)
        raw = np.ascontiguousarray(tensor.data).reshape(matrix.rows, -1)
        padded = np.zeros(raw.nbytes + 4, np.uint8)  # a kernel reads up to three bytes more
        padded[: raw.nbytes] = raw.reshape(-1)
        unpack(self.launcher, matrix, 0, DeviceArray(self.work.upload("raw", padded).address, UINT8, raw.shape), None)
        return matrix, dequantize(raw, kind)

    def operand(self, rows, columns, rng, scale=2.0**5):
        """(an operand, its rows in float32)"""
        x = (rng.standard_normal((rows, columns)) * rng.uniform(0.01, 20, (rows, 1))).astype(np.float16)
        stored = np.zeros((rows, HALVES.padded(columns)), np.float16)
        stored[:, operand_positions(columns)] = x
        values = self.work.upload("x", stored)
        one = self.small.constant(np.array([scale], np.float32))
        return Operand(values, columns, one), x.astype(np.float32) / np.float32(scale)

    def integers(self, matrix):
        """(the integers of a matrix in the order of its rotated columns, the rows' scales)"""
        tiles = self.get(matrix.array).reshape(matrix.row_tiles, matrix.units, 32, 128)
        row = np.arange(32)
        place = (row >> 2 & 3) << 3 | (row >> 1 & 1) << 2 | (row >> 4 & 1) << 1 | row & 1
        position = operand_positions(128)
        at = (position // 16 ^ place[:, None] % 8) * 16 + position % 16
        rows = tiles[:, :, place[:, None], at].transpose(0, 2, 1, 3).reshape(matrix.row_tiles * 32, -1)
        return rows[: matrix.rows], self.get(matrix.scales)[: matrix.rows]

    def rounded(self, a):
        """The same of an operand."""
        made = self.gemms.choose([self.matrix("attn_q", (1, a.columns))[0]]).rounded(a)
        rows = self.get(made.values).reshape(a.rows, -1, 128)[:, :, operand_positions(128)]
        return rows.reshape(a.rows, -1), self.get(made.scale)[: a.rows]

    def close(self):
        self.small.close()
        if self.backend is not None:
            self.backend.close()


@pytest.fixture(scope="module", params=DEVICES, ids="-".join)
def device(request):
    device = Device(*request.param)
    yield device
    device.close()


def rotated(x):
    """Rows of which each 128 columns are multiplied by the orthogonal Hadamard matrix, in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % 128)))
    return (padded.reshape(len(x), -1, 128) @ HADAMARD).reshape(padded.shape)


def check_rounded(x, integers, scales):
    """As models/precision.py says, but for what is as near to one integer as to the next."""
    exact = rotated(x)
    largest = np.abs(exact).max(axis=1)
    assert np.allclose(scales, largest / 127, rtol=1e-5, atol=0)
    off = integers - exact / np.where(largest > 0, largest / 127, 1)[:, None]
    assert np.abs(off).max() <= 0.5 + 1e-3 and np.abs(integers.astype(int)).max() <= 127


@pytest.mark.parametrize("kind", sorted(SUPPORTED), ids=lambda kind: kind.name)
def test_weights(device, kind):
    """Of every format; and rows and columns past the matrix's are zeros."""
    for shape in ((45, 256), (32, 768)):
        matrix, rows = device.matrix("attn_q", shape, kind)
        check_rounded(rows, *device.integers(matrix))
    beyond = replace(device.matrix("attn_q", (45, 256), kind)[0], rows=64)
    integers, scales = device.integers(beyond)
    assert not integers[45:].any() and not scales[45:].any()


def test_weights_of_parts_and_stacks(device):
    """Rows of a matrix, those that are picked of one, and stacks of matrices."""
    whole = SyntheticTensor("blk.0.attn_qkv.weight", (96, 256), GGML.Q4_K)
    picked = whole.picked(np.array([5, 95, 6, 0]), "blk.0.attn_qkv.weight[q]")
    stack = SyntheticTensor("blk.0.ffn_up_exps.weight", (3, 64, 256), GGML.Q4_K)
    for tensor in (whole.rows(32, 70), picked, stack, stack.within(0, 32)):
        matrix, rows = device.matrix("part", None, tensor=tensor)
        check_rounded(rows, *device.integers(matrix))


@pytest.mark.parametrize("columns", [64, 100, 128, 768, 1000, 4096, 5000, 20000])
def test_operands(device, columns, rng, monkeypatch):
    a, x = device.operand(5, columns, rng)
    few = device.rounded(a)
    check_rounded(x, *few)
    for rows in (200, 1 << 20):  # however many there are
        monkeypatch.setattr(int8, "rounding", lambda padded, _, rows=rows: rounding(padded, rows))
        device.poisoned("int8 operand", INT8, 5, BYTES.padded(columns))
        device.poisoned("int8 operand's scales", FLOAT32, 5 + MORE_ROWS)
        assert all(np.array_equal(*pair) for pair in zip(few, device.rounded(a)))


def test_norms_whose_rows_are_rounded_at_once(device, rng):
    """The kernel that normalises gives the halves of rms_norm, and of these what rounding them by itself gives."""
    for columns in (100, 602, 2048, 5000, 20000):
        x = device.work.upload("stream", rng.standard_normal((3, columns)).astype(np.float32))
        weight = device.work.upload("norm", rng.uniform(0.5, 2, columns).astype(np.float32))
        scale, padded = device.small.constant(np.array([64.0], np.float32)), BYTES.padded(columns)
        given = {"x": x, "weight": weight, "columns": columns, "stride": HALVES.padded(columns), "epsilon": 1e-6}
        given |= {"scale": scale}
        alone = device.poisoned("alone", FLOAT16, 3, HALVES.padded(columns))
        device.launcher.launch(NORM, "rms_norm", grid=3, out=alone, rows=None, **given)
        a = Operand(alone, columns, scale)
        by_itself = device.rounded(a)
        program = rounded_norm(padded)
        halves = device.poisoned("halves", FLOAT16, 3, HALVES.padded(columns))
        rounded, scales = device.poisoned("rounded", INT8, 3, padded), device.poisoned("scales", FLOAT32, 3)
        own = {"rows": 3, "out": halves, "rounded": rounded, "padded": padded, "scales": scales}
        device.launcher.launch(program.program, "rms_norm_rounded", grid=program.blocks(3), **own, **given)
        assert np.array_equal(device.get(halves), device.get(alone))
        together = device.rounded(replace(a, rounded=(rounded, scales)))
        assert all(np.array_equal(*pair) for pair in zip(together, by_itself))
        if columns > program.columns:
            continue
        device.poisoned("rounded", INT8, 3, padded), device.poisoned("scales", FLOAT32, 3)
        device.launcher.launch(
            program.program, "rms_norm_rounded", grid=program.blocks(3), **own | {"out": None}, **given
        )
        together = device.rounded(Operand(rounded, columns, scales, format=BYTES))
        assert all(np.array_equal(*pair) for pair in zip(together, by_itself))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(device, bad, rng):
    """In its own row, and in no other."""
    a, _ = device.operand(3, 200, rng)
    values = device.get(a.values)
    values[1, 7] = bad
    device.gpu.upload(a.values.address, values)
    matrix, _ = device.matrix("attn_q", (33, 200))
    out = device.poisoned("out", FLOAT32, 3, 33)
    device.gemms.choose([matrix]).linear(a, [matrix], out, None, None, False)
    finite = np.isfinite(device.get(out))
    assert finite[[0, 2]].all() and not finite[1].any()


def products(device, a, matrices):
    """What an operand gives with matrices side by side, of their integers: float64 [rows, all rows]."""
    x, x_scale = device.rounded(a)
    made = [device.integers(matrix) for matrix in matrices]
    sums = x.astype(np.int64) @ np.concatenate([rows for rows, _ in made]).astype(np.int64).T
    return sums * x_scale[:, None].astype(np.float64) * np.concatenate([scale for _, scale in made])


def close_to(expected, got, tolerance=1e-6):
    """Each of them, beside the largest of its row."""
    return (np.abs(got - expected) <= tolerance * np.abs(expected).max(axis=-1, keepdims=True)).all()


def sizes(device_of):
    """Tokens, fewer on the host."""
    return (1, 7, 65) if device_of.backend is None else (1, 7, 16, 63, 64, 65, 129, 300, 600)


@pytest.mark.parametrize("columns", [100, 384])
@pytest.mark.parametrize("rows", [(64,), (33,), (96, 33, 70), (128, 64, 64)], ids=str)
def test_linear(device, rows, columns, rng):
    """Matrices side by side, with a bias, and added to what is there: the integers' own products."""
    matrices = [device.matrix(f"attn_{'qkv'[i]}", (n, columns))[0] for i, n in enumerate(rows)]
    bias = rng.standard_normal(sum(rows)).astype(np.float32)
    gemm, held = device.gemms.choose(matrices), device.work.upload("bias", bias)
    for n in sizes(device):
        a, _ = device.operand(n, columns, rng)
        expected = products(device, a, matrices)
        out = device.poisoned("out", FLOAT32, n, sum(rows))
        gemm.linear(a, matrices, out, None, None, False)
        plain = device.get(out)
        assert close_to(expected, plain)
        gemm.linear(a, matrices, out, None, held, True)
        assert close_to(plain + expected + bias, device.get(out))
        first = device.poisoned("out", FLOAT32, 1, sum(rows))
        gemm.linear(a.part(n - 1, n), matrices, first, None, None, False)
        assert np.array_equal(device.get(first)[0], plain[-1])  # whatever else is multiplied with it
        part = device.poisoned("out", FLOAT32, n - n // 2, sum(rows))
        gemm.linear(gemm.rounded(a).part(n // 2, n), matrices, part, None, None, False)
        assert np.array_equal(device.get(part), plain[n // 2 :])


def activated(gate, up, activation="silu"):
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        return gate / (1 + np.exp(-1.702 * gate)) * up
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(
    "features,columns,activation",
    [(64, 128, "silu"), (160, 200, "gelu_tanh"), (100, 384, "silu"), (96, 128, "swiglu_oai")],
)
def test_gated(device, features, columns, activation, rng):
    gate, up = (device.matrix(f"ffn_{name}", (features, columns))[0] for name in ("gate", "up"))
    biases = rng.standard_normal((2, features)).astype(np.float32)
    held = tuple(device.work.upload(f"bias {i}", biases[i]) for i in range(2))
    act_scale = device.small.constant(np.array([4.0], np.float32))
    for n in sizes(device):
        a, _ = device.operand(n, columns, rng)
        values = device.poisoned("act", FLOAT16, n, HALVES.padded(features))
        gemm = device.gemms.choose([gate, up])
        gemm.gated(a, gate, up, Operand(values, features, act_scale), None, held, activation)
        expected = activated(*(products(device, a, [m]) + b for m, b in zip((gate, up), biases)), activation)
        got = device.get(values).astype(np.float64)
        at = operand_positions(features)
        assert close_to(expected, got[:, at] / 4, 1e-3)
        assert not np.delete(got, at, axis=1).any()


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu_squared"])
@pytest.mark.parametrize("features,columns", [(64, 128), (100, 384)])
def test_networks_without_a_gate(device, features, columns, activation, rng):
    up, _ = device.matrix("ffn_up", (features, columns))
    bias = rng.standard_normal(features).astype(np.float32)
    held, act_scale = device.work.upload("bias", bias), device.small.constant(np.array([0.25], np.float32))
    for n in sizes(device):
        a, _ = device.operand(n, columns, rng)
        values = device.poisoned("act", FLOAT16, n, HALVES.padded(features))
        device.gemms.choose([up]).activated(a, up, Operand(values, features, act_scale), None, held, activation)
        x = products(device, a, [up]) + bias
        tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        expected = np.maximum(x, 0) ** 2 if activation == "relu_squared" else 0.5 * x * (1 + tanh)
        got = device.get(values).astype(np.float64)
        at = operand_positions(features)
        assert close_to(expected, got[:, at] * 4, 1e-3)
        assert not np.delete(got, at, axis=1).any()


def grouped(device, counts, most):
    """Groups of at most so many rows, of experts that have these counts of them."""
    groups, first = [], 0
    for expert, count in enumerate(counts):
        groups += [(first + at, first + min(at + most, count), expert, 0) for at in range(0, count, most)]
        first += count
    listed = device.work.upload("groups", np.array(groups, np.int32))
    return Groups(listed, device.work.upload("group count", np.array([len(groups)], np.int32)), len(counts))


@pytest.mark.parametrize("counts", [(5, 0, 70, 1), (300, 17, 0, 130)], ids=str)
def test_experts(device, counts, rng):
    """Rows in groups, each with its own matrices, and biases."""
    if device.backend is None and sum(counts) > 100:
        counts = (20, 3, 0, 17)
    features, columns, experts, n = 96, 256, len(counts), sum(counts)
    stacks = [device.matrix(f"ffn_{name}_exps", (experts, features, columns), GGML.Q8_0)[0] for name in ("gate", "up")]
    ones = [stack.one_of(experts) for stack in stacks]
    biases = rng.standard_normal((2, experts, features)).astype(np.float32)
    held = tuple(device.work.upload(f"bias {i}", biases[i]) for i in range(2))
    scale = device.small.constant(np.array([8.0], np.float32))
    a, _ = device.operand(n, columns, rng)
    first = np.repeat(np.arange(experts), counts) * features
    expected = [
        np.take_along_axis(products(device, a, [stack]), first[:, None] + np.arange(features), axis=1)
        + bias.reshape(-1)[first[:, None] + np.arange(features)]
        for stack, bias in zip(stacks, biases)
    ]
    gemm = device.gemms.choose(ones[:1])
    out = device.poisoned("sums", FLOAT16, n, features)
    groups = grouped(device, counts, gemm.group_rows(n, ones[:1], False, experts))
    gemm.linear(a, ones[:1], out, None, held[0], False, groups, scale)
    assert close_to(expected[0], device.get(out).astype(np.float64) / 8, 1e-3)
    values = device.poisoned("act", FLOAT16, n, HALVES.padded(features))
    groups = grouped(device, counts, gemm.group_rows(n, ones, True, experts))
    gemm.gated(a, *ones, Operand(values, features, scale), None, held, "silu", groups)
    got = device.get(values)[:, operand_positions(features)].astype(np.float64) / 8
    assert close_to(activated(*expected), got, 1e-3)


def test_outputs_keep_to_the_bound_that_scales_come_from(device, rng):
    """However x is rounded: |W · x'| is at most the row's measured length times |x / norm|."""
    columns = 512
    norm = rng.uniform(0.1, 3, columns).astype(np.float32)
    matrix, rows = device.matrix("attn_q", (64, columns))
    held = device.work.upload("norm", norm)
    device.scales.of_weights([matrix], held)
    lengths = device.get(device.scales.row_norms(matrix))
    x = rows[:8] * norm**2  # as loud as can be for these rows
    x = np.concatenate([x, rng.standard_normal((8, columns)) * (rng.random((8, columns)) < 0.01)]).astype(np.float16)
    stored = np.zeros((16, columns), np.float16)
    stored[:, operand_positions(columns)] = x
    a = Operand(device.work.upload("x", stored), columns, device.small.constant(np.ones(1, np.float32)))
    made = np.abs(products(device, a, [matrix]))
    bound = lengths * np.linalg.norm(x.astype(np.float64) / norm, axis=1)[:, None]
    assert (made <= bound * (1 + 1e-5)).all() and (lengths < 20 * np.linalg.norm(rows * norm, axis=1)).all()
