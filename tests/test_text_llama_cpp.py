"""Token ids of hard strings against llama.cpp's own (the `compare` extra; for models' vocabularies also
$KQPREFILL_VOCABS: see test_text.py).

`python tests/test_text_llama_cpp.py` writes tests/data/cuts.json anew, which test_text.py reads: the ids that llama.cpp
gives to some of the strings, by name of the pre-tokenizer.
"""

import json
import random
import tempfile
import unicodedata
import urllib.request

import gguf
import numpy as np
import pytest

from kqprefill.gguf import GGUFFile
from kqprefill.gguf.vocabulary import byte_pieces
from kqprefill.text import Tokenizer
from test_text import CUTS, KINDS, VOCABS, vocabulary_of_merges

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


# What the ways of cutting a text into words differ in.
CUT = [
    "HelloWorld's AbC'S x'll'T y'Re z'vE中's 中文's中国人 a中b aB1234567'd",
    "中\u0301 e\u0301'm 〇一二 ㍿豈\ufa6e更 𠀀𪛟𪜀 \u3005々〆 x\ufa6e \u9fffx\u4dbf",
    "!中 中  中\n\n中x,中。，x\u3000y　。\u2004a",
    "ſ's 'ſ x'ſ K'\u212a İ'İs x'M x'D\r\n 'sabc x' s\t'tx",
    "ԱՑֈ ლარი ჀႠ ⴀⴭ Ꞑꟺ ꬰꭨ 𝕳𝟎 𐖗 𖹀 Ǆǅ",
    "a.b,c(d) :-) #x @y 12,345.67 ٣٤٥٦ १२३४ x1y22z333w4444",
]
# One name of each way that cuts as llama.cpp does. The three that part words at capitals do not: they are the models'
# own patterns, of which llama.cpp's are simpler forms.
WAYS = (
    "gpt-2 smollm llama-bpe chatglm-bpe glm4 qwen2 qwen35 kimi-k2 deepseek-v3 deepseek-llm deepseek-coder falcon "
    "seed-coder "
    "default"
).split()


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


def llama_cpp_server(vocabulary, folder):
    """llama.cpp with that vocabulary."""
    llama_cpp = pytest.importorskip("xllamacpp")
    tiny_model(vocabulary, folder / "model.gguf")
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(folder / "model.gguf"), 64, 1
    return llama_cpp.Server(parameters)


def llama_cpp_ids(server, text, special, parsed):
    """The ids that it gives to a text."""
    body = json.dumps({"content": text, "add_special": special, "parse_special": parsed}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


@pytest.mark.parametrize("name", KINDS)
def test_hard_strings(name, tmp_path):
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("set KQPREFILL_VOCABS to llama.cpp's models/ folder")
    with GGUFFile(path) as vocabulary:
        tokenizer = Tokenizer(vocabulary.metadata, path)
        server = llama_cpp_server(vocabulary, tmp_path)
    for text in hard_strings():
        for special, parsed in ((True, True), (False, True), (False, False)):
            found = tokenizer.encode(text, add_special=special, parse_special=parsed)
            assert found == llama_cpp_ids(server, text, special, parsed), (repr(text), parsed)


def merges_across(texts, size):
    """The merges of BPE trained on whole texts: most cuts part what they would join, and are seen in the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(byte_pieces()), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


class Vocabulary:
    """What `tiny_model` takes: the vocabulary of those merges."""

    def __init__(self, merges, pre):
        self.metadata = vocabulary_of_merges(merges, pre)


def random_texts(rng, n):
    """Of what the ways differ in, but no letters that the libraries' versions of Unicode differ in."""
    spans = [*SCRIPTS, (0x550, 0x590), (0x10D0, 0x1100), (0x2D20, 0x2D2E), (0xA7F5, 0xA7FB), (0xAB2C, 0xAB69)]
    spans += [(0x3000, 0x3010), (0x4DBC, 0x4E02), (0xF900, 0xF904), (0x20000, 0x20004), (0x1D7C8, 0x1D7D2)]
    characters = [chr(code) for span in spans for code in range(*span)]
    characters = [character for character in characters if unicodedata.category(character) != "Cn"]
    characters += ["'s", "'LL", "'re", "\n", "\r", " ", "  ", "12", "ab", "中"] * 15
    return ["".join(rng.choice(characters, rng.integers(1, 30))) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("pre", WAYS)
def test_ways_of_cutting(pre, tmp_path, rng):
    texts = [*hard_strings(), *CUT, *random_texts(rng, 500)]
    vocabulary = Vocabulary(merges_across(texts, 10000), pre)
    tokenizer = Tokenizer(vocabulary.metadata, "test")
    server = llama_cpp_server(vocabulary, tmp_path)
    for text in texts:
        for special in (True, False):
            found = tokenizer.encode(text, add_special=special, parse_special=False)
            assert found == llama_cpp_ids(server, text, special, False), repr(text)


def write_cuts():
    from pathlib import Path

    texts = [*HARD, *CUT, *hard_strings()[len(HARD) : len(HARD) + 20]]
    merges, ids = merges_across(texts, 1500), {}
    for pre in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            server = llama_cpp_server(Vocabulary(merges, pre), Path(folder))
            ids[pre] = [llama_cpp_ids(server, text, False, False) for text in texts]
            del server
    CUTS.write_text(json.dumps({"merges": merges, "texts": texts, "ids": ids}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_cuts()
