"""Token ids of hard strings against llama.cpp's own (the `compare` extra, and $KQPREFILL_VOCABS: see test_text.py)."""

import json
import random
import urllib.request

import gguf
import numpy as np
import pytest

from kqprefill.gguf import GGUFFile
from kqprefill.text import Tokenizer
from test_text import KINDS, VOCABS

SCRIPTS = [
    (0x20, 0x7F),
    (0xA0, 0x180),
    (0x300, 0x370),
    (0x400, 0x460),
    (0x5D0, 0x5F0),
    (0x900, 0x950),
    (0xE00, 0xE40),
    (0x2000, 0x2070),
    (0x3040, 0x30FF),
    (0x4E00, 0x4E80),
    (0xAC00, 0xAC40),
    (0x1F600, 0x1F640),
]
HARD = [
    "",
    " ",
    "\n\n \t\r\n x",
    "don't WON'T I'LL you'Ve 'S",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ☺️✊🏿",
    "e\u0301 a\u0300\u0323 Z\u0335\u0321a\u0334",
    "1234567890" * 4,
    "3.14159 1,000,000 0x1F ٣٤٥ १२३ Ⅳ ½ ²",
    "def f(x):\n    return {'a': [1, x**2]}\n\n\tif  x:  #   c\n",
    "你好，世界！我們 한국어 こんにちは ﾊﾝｶｸ",
    "مرحبا שלום नमस्ते สวัสดี",
    "\x00\x01\x1b[31mred\x7f\x85\u200b\ufeff\u2028\u00a0x\u3000y",
    " <|end|>  <|user|> \n x <|assistant|>",
    "<s></s><unk><|endoftext|><|im_start|>user\nhi<|im_end|>\n<|begin_of_text|><|eot_id|><bos><end_of_turn>",
    "ǅ ß İ ı ﬀ ª º ᾳ",
    "   leading and trailing   ",
    "\U0001f600" * 20,
    "x" * 300,
    " " * 100,
    "!" * 50,
    "𝕳𝖊𝖑𝖑𝖔 𠀀 \U0010ffff",
    "<0x0A> ▁▁ ▁a",
    "\r\r\n\r",
]


def hard_strings():
    rng = random.Random(1)
    characters = [chr(code) for span in SCRIPTS for code in range(*span)] + ["\n", " ", "  ", "'s", "<s>", "123"] * 20
    return HARD + ["".join(rng.choices(characters, k=rng.randrange(1, 60))) for _ in range(300)]


def tiny_model(vocabulary, path):
    """A Llama of one layer that llama.cpp will load, with this file's vocabulary."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    n = len(vocabulary.metadata["tokenizer.ggml.tokens"])
    sizes = {
        "context_length": 4096,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "vocab_size": n,
        "rope.dimension_count": 64,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("general.name", str(vocabulary.metadata.get("general.name", "")))
    for key, value in vocabulary.metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if isinstance(value, np.ndarray):
            kind = gguf.GGUFValueType.FLOAT32 if value.dtype.kind == "f" else gguf.GGUFValueType.INT32
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kind)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (n, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    for name, shape in {**shapes, **{f"blk.0.{name}": (64, 64) for name in square}}.items():
        weights = rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float16 if len(shape) == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", KINDS)
def test_hard_strings(name, tmp_path):
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("set KQPREFILL_VOCABS to llama.cpp's models/ folder")
    llama_cpp = pytest.importorskip("xllamacpp")
    with GGUFFile(path) as vocabulary:
        tokenizer = Tokenizer(vocabulary.metadata, path)
        tiny_model(vocabulary, tmp_path / "model.gguf")
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(tmp_path / "model.gguf"), 64, 1
    server = llama_cpp.Server(parameters)
    for text in hard_strings():
        for special, parsed in ((True, True), (False, True), (False, False)):
            body = json.dumps({"content": text, "add_special": special, "parse_special": parsed}).encode()
            request = urllib.request.Request(
                f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as answer:
                expected = json.load(answer)["tokens"]
            found = tokenizer.encode(text, add_special=special, parse_special=parsed)
            assert found == expected, (repr(text), parsed)
