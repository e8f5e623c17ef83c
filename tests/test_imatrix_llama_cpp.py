"""Importance matrices against llama.cpp itself (the `compare` extra): the sums of what its graphs multiply.

The wheel has no llama-imatrix, but the hook that it is made with: a callback that sees each node of a graph once it is
computed. What llama-imatrix sums is written down anew here (llama.cpp, tools/imatrix: `collect_imatrix`), in float64.
"""

import ctypes
import os
import struct

from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
import numpy as np
import pytest

from conftest import CASES, found
import kqprefill
from kqprefill.engine.imatrix import importance_matrix

pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed (pip install xllamacpp)")

CONTEXT, CHUNKS = 64, 2
# llama.cpp rounds what a GELU makes to half precision (ggml's table of it).
ROUNDING = {"gemma": 3e-3}
_ROOM, _CB_EVAL, _NE, _NB, _SRC, _MOST_DIMS = 1024, 88, 16, 48, 152, 4
_FIELDS = {0: CONTEXT, 4: CONTEXT, 8: CONTEXT, 12: 1, 20: CONTEXT, 24: CONTEXT, 28: 1, 32: 1, 52: 0, 104: 0, 108: 0}


class _Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * _ROOM)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


@pytest.fixture(scope="module")
def library():
    import xllamacpp

    folder = os.path.dirname(xllamacpp.__file__)
    lib = ctypes.CDLL(os.path.join(folder, next(name for name in os.listdir(folder) if name.endswith(".so"))))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []),
        ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
    ):
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    lib.llama_backend_init()
    return lib


class Sums:
    """What llama-imatrix would sum, by tensor: (sums, counts)."""

    def __init__(self, library):
        self._lib, self.entries = library, {}
        self.callback = _Callback(self._hear)

    def _array(self, node, dtype):
        """A node's values, slowest dimension first."""
        ne, nb = (struct.unpack("<4q", ctypes.string_at(node + at, 8 * _MOST_DIMS)) for at in (_NE, _NB))
        span = sum((n - 1) * b for n, b in zip(ne, nb, strict=True)) + 4
        data = np.frombuffer(ctypes.string_at(self._lib.ggml_get_data(node), span), dtype)
        return np.lib.stride_tricks.as_strided(data, ne[::-1], nb[::-1])

    def _hear(self, node, ask, data):
        op = self._lib.ggml_op_desc(node)
        if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not ask
        sources = struct.unpack("<3Q", ctypes.string_at(node + _SRC, 24))
        name = self._lib.ggml_get_name(sources[0]).decode()
        if not name.startswith("blk.") and name != "output.weight":
            return not ask
        if ask:
            return True
        x = self._array(sources[1], np.float32)
        stack, columns = self._array_shape(sources[0])[1], x.shape[-1]
        if op == b"MUL_MAT_ID":
            sums, counts = self.entries.setdefault(name, (np.zeros((stack, columns)), np.zeros(stack, int)))
            for token, experts in enumerate(self._array(sources[2], np.int32)[0, 0]):
                for slot, expert in enumerate(experts):
                    sums[expert] += np.square(x[0, token, slot % x.shape[2]], dtype=np.float64)
                    counts[expert] += 1
            return True
        sums, counts = self.entries.setdefault(name, (np.zeros((stack, columns)), np.zeros(1, int)))
        squares = np.square(x, dtype=np.float64).sum(axis=2)[0]  # of each matrix
        sums += squares if stack > 1 else squares.sum(axis=0)
        counts += x.shape[0] * x.shape[1] * x.shape[2] // stack
        return True

    def _array_shape(self, node):
        return struct.unpack("<4q", ctypes.string_at(node + _NE, 8 * _MOST_DIMS))[::-1]

    def collect(self, path, chunks):
        """Run each chunk by itself."""
        lib, params = self._lib, self._lib.llama_context_default_params()
        model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        for offset, value in _FIELDS.items():
            struct.pack_into("<i", params.bytes, offset, value)
        struct.pack_into("<Q", params.bytes, _CB_EVAL, ctypes.cast(self.callback, ctypes.c_void_p).value)
        context = lib.llama_init_from_model(model, params)
        assert model and context
        zero = ctypes.c_int32(0)
        for chunk in chunks:
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            n = len(chunk)
            held = [
                (ctypes.c_int32 * n)(*map(int, chunk)),
                (ctypes.c_int32 * n)(*range(n)),
                (ctypes.c_int32 * n)(*[1] * n),
                (ctypes.POINTER(ctypes.c_int32) * n)(*[ctypes.pointer(zero)] * n),
                (ctypes.c_int8 * n)(*[1] * n),
            ]
            token, *others = (ctypes.cast(array, ctypes.c_void_p) for array in held)
            assert lib.llama_decode(context, _Batch(n, token, None, *others)) == 0
        lib.llama_free(context)
        lib.llama_model_free(model)


def in_float32(source, path):
    """A file of the same model whose tensors are F32: of others llama.cpp would round activations, too."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "case",
    [
        path.stem
        for path in found(
            "llama-q4_k_m qwen2-q5_k qwen3-q4_k gemma3-q4_k_m phi3-q4_k_m granite-q4_k glm4moe-nextn-q3_k_m "
            "qwen35moe-q4_k_m qwen3next-moe-q3_k_m qwen3vlmoe-q4_k_m gemma4-q4_k_m deepseek2-moe-glm47-q3_k_m "
            "deepseek2-moe-kv_b-q3_k_m gemma4-moe-q4_k_m gemma4-e2b-q3_k_m gpt-oss-mxfp4 qwen2moe-q4_k"
        )
    ],
)
def test_sums_are_llama_cpps(case, library, tmp_path):
    """To 1e-4 each, but for sums of a few values near zero. The tokens are the same in every run, so that no two
    experts are ever all but equal."""
    path = in_float32(CASES[case], tmp_path / "model.gguf")
    with kqprefill.load(path, backend="cpu") as model:
        tokens = np.arange(CHUNKS * CONTEXT) * 7919 % model.config.vocab_size
        made = importance_matrix(model, tokens, CONTEXT, output=True).matrix(CONTEXT, "").entries
    theirs = Sums(library)
    theirs.collect(path, tokens.reshape(CHUNKS, CONTEXT))
    assert set(made) == set(theirs.entries)
    rounding = next((value for name, value in ROUNDING.items() if case.startswith(name)), 1e-4)
    for name, (sums, counts) in theirs.entries.items():
        assert made[name].counts.tolist() == counts.tolist(), name
        np.testing.assert_allclose(made[name].sums, sums.ravel(), rtol=rounding, atol=1e-6 * sums.mean(), err_msg=name)
