"""llama.cpp through the C API of the wheel xllamacpp, for tests that hand states to it.

Its structures are taken as bytes: `*_default_params` fill them, and the few fields that are set lie where the offsets
say (those of the version that the wheel has).
"""

import ctypes
import os
import struct

import gguf
import numpy as np

from kqprefill.gguf import GGUFFile, dequantize

_CONTEXT = {"n_ctx": 0, "n_batch": 4, "n_ubatch": 8, "n_seq_max": 12, "n_outputs_max": 20, "n_outputs_max_per_seq": 24}
_CONTEXT |= {"n_threads": 28, "n_threads_batch": 32, "flash_attn_type": 52, "type_k": 104, "type_v": 108}
_SWA_FULL = 140  # llama_context_params.swa_full; the flags begin at 136
_ROOM = 1024  # bytes of a structure, at least
F32, F16, Q8_0 = 0, 1, 8


class _Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * _ROOM)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def as_f32(path, to):
    """A GGUF's model with all its weights in F32, whose products llama.cpp does not round: what differs then is what it
    was given. Returns `to`."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    with GGUFFile(str(path)) as file:
        for name, tensor in file.tensors.items():
            writer.add_tensor(name, dequantize(tensor.data, tensor.type).reshape(tensor.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said = []  # what llama.cpp has logged


def _log(level, text, data):
    _said.append(text.decode(errors="replace"))


_LOGGER = _LOG(_log)  # kept alive
_library = None


def library():
    """The wheel's C API; ImportError where it is not installed."""
    global _library
    if _library is None:
        import xllamacpp

        folder = os.path.dirname(xllamacpp.__file__)
        [name] = [n for n in os.listdir(folder) if n.endswith(".so")]
        lib = ctypes.CDLL(os.path.join(folder, name))
        for made in ("llama_model_default_params", "llama_context_default_params"):
            getattr(lib, made).restype = _Params
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
        lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Params]
        lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        lib.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        for name in ("llama_free", "llama_model_free", "llama_model_get_vocab"):
            getattr(lib, name).argtypes = [ctypes.c_void_p]
        lib.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
        lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
        tokens, count = ctypes.POINTER(ctypes.c_int32), ctypes.c_size_t
        seq = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, tokens, count]
        for name, types in (
            ("llama_state_seq_load_file", [*seq, ctypes.POINTER(count)]),
            ("llama_state_seq_save_file", seq),
        ):
            getattr(lib, name).restype, getattr(lib, name).argtypes = count, types
        session = [ctypes.c_void_p, ctypes.c_char_p, tokens, count]
        for name, types in (
            ("llama_state_load_file", [*session, ctypes.POINTER(count)]),
            ("llama_state_save_file", session),
        ):
            getattr(lib, name).restype, getattr(lib, name).argtypes = ctypes.c_bool, types
        lib.llama_log_set.argtypes = [_LOG, ctypes.c_void_p]
        lib.llama_log_set(_LOGGER, None)
        lib.llama_backend_init()
        _library = lib
    return _library


class LlamaCpp:
    """A model and a context of llama.cpp on the CPU; a context manager.

    n_ctx: of all sequences. flash: False for `-fa off`, whose cache has V transposed. type_k, type_v: ggml's numbers.
    """

    def __init__(self, path, n_ctx=1024, flash=True, type_k=F16, type_v=F16, swa_full=False, n_seq_max=1, n_ubatch=512):
        lib, model, context = (
            library(),
            library().llama_model_default_params(),
            library().llama_context_default_params(),
        )
        self.model = lib.llama_model_load_from_file(os.fsencode(path), model)
        assert self.model, "".join(_said[-5:])
        values = {"n_ctx": n_ctx, "n_batch": 2048, "n_ubatch": n_ubatch, "n_seq_max": n_seq_max, "n_threads": 1}
        values |= {"n_threads_batch": 1, "flash_attn_type": int(flash), "type_k": type_k, "type_v": type_v}
        for name, value in values.items():
            struct.pack_into("<i", context.bytes, _CONTEXT[name], value)
        context.bytes[_SWA_FULL] = int(swa_full)
        self.context = lib.llama_init_from_model(self.model, context)
        assert self.context, "".join(_said[-5:])
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def decode(self, tokens, position):
        """The last token's logits, float32 [V], after all of them have been evaluated from a position on."""
        n, tokens = len(tokens), [int(t) for t in tokens]
        ids, places = (ctypes.c_int32 * n)(*tokens), (ctypes.c_int32 * n)(*range(position, position + n))
        zero = ctypes.pointer(ctypes.c_int32(0))
        batch = _Batch(
            n,
            ids,
            None,
            places,
            (ctypes.c_int32 * n)(*[1] * n),
            (ctypes.POINTER(ctypes.c_int32) * n)(*[zero] * n),
            (ctypes.c_int8 * n)(*[0] * (n - 1), 1),
        )
        before = len(_said)
        assert library().llama_decode(self.context, batch) == 0, "".join(_said[before:])
        logits = library().llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab,)).copy()

    def load(self, path, capacity=1 << 17, session=False):
        """The token ids of a sequence file (or a session's), whose state sequence 0 then has; what llama.cpp logs where
        it refuses the file is the AssertionError's text."""
        before = len(_said)
        tokens, count = (ctypes.c_int32 * capacity)(), ctypes.c_size_t()
        name = os.fsencode(path)
        if session:
            ok = library().llama_state_load_file(self.context, name, tokens, capacity, ctypes.byref(count))
        else:
            ok = library().llama_state_seq_load_file(self.context, name, 0, tokens, capacity, ctypes.byref(count))
        assert ok, "".join(_said[before:])
        return list(tokens[: count.value])

    def save(self, path, tokens, session=False):
        """Write sequence 0 (or a session) to a file."""
        ids = (ctypes.c_int32 * len(tokens))(*[int(t) for t in tokens])
        if session:
            assert library().llama_state_save_file(self.context, os.fsencode(path), ids, len(tokens))
        else:
            assert library().llama_state_seq_save_file(self.context, os.fsencode(path), 0, ids, len(tokens))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        library().llama_free(self.context)
        library().llama_model_free(self.model)
