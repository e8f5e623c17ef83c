"""Text to token ids: small vocabularies by hand, real ones against llama.cpp's ids.

$KQPREFILL_VOCABS: a folder of llama.cpp's models/ggml-vocab-*.gguf with their .inp and .out (its source has them; the
source distribution of llama-cpp-python on PyPI contains it).
"""

from itertools import pairwise
import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.vocabulary import byte_pieces
from kqprefill.synthetic import SyntheticFile, write_gguf
from kqprefill.text import Tokenizer
from test_cli import kq

CUTS = ROOT / "tests" / "data" / "cuts.json"  # see test_text_llama_cpp.py
VOCABS = Path(os.environ.get("KQPREFILL_VOCABS", "/nonexistent"))


def sentencepieces(pieces, **more):
    """A Tokenizer over <unk>, <s>, </s>, the 256 bytes and these (piece, score)."""
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    values = {
        "model": "llama",
        "tokens": fixed + [p for p, _ in pieces],
        "token_type": np.array(kinds, np.int32),
        "scores": np.array([0.0] * len(fixed) + [s for _, s in pieces], np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return Tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, "test"), len(fixed)


def test_the_highest_score_is_joined_first_and_the_leftmost_of_equals():
    pieces = [("a", -1), ("b", -1), ("aa", -2), ("ab", -3), ("aab", -9), ("\u2581", -1), ("\u2581a", -5)]
    tokenizer, first = sentencepieces(pieces, add_space_prefix=False)
    ids = {piece: first + i for i, (piece, _) in enumerate(pieces)}

    def encode(text):
        return tokenizer.encode(text, add_special=False)

    assert encode("aaa") == [ids["aa"], ids["a"]]
    assert encode("aab") == [ids["aab"]]  # aa and b
    assert encode("abab") == [ids["ab"]] * 2
    assert encode("b a") == [ids["b"], ids["\u2581a"]]
    assert encode("é") == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("") == [1]


def test_spaces_before_and_special_tokens_within():
    tokenizer, first = sentencepieces([("\u2581", -1), ("x", -1), ("\u2581x", -2)], add_eos_token=True)
    assert tokenizer.encode("x") == [1, first + 2, 2]
    assert tokenizer.encode("x</s>x", add_special=False) == [first + 2, 2, first + 2]
    assert tokenizer.encode("<s>", add_special=False) == [1]


def test_pairs_of_characters():
    pieces = ["<pad>", "<bos>", "<turn|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "ab", "\u2581a", "\n", "\n\n", "aa", "\u2581\u2581"]
    metadata = {
        "model": "gemma4",
        "tokens": pieces,
        "token_type": np.array([3] * 3 + [6] * 256 + [1] * 9, np.int32),
        "merges": ["\u2581 \u2581", "a b", "\u2581 a", "a a", "b a"],
        "bos_token_id": 1,
        "add_bos_token": False,  # not heeded
    }
    tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "test")
    ids = {piece: i for i, piece in enumerate(pieces)}

    def encode(text):
        return [pieces[token] for token in tokenizer.encode(text, add_special=False)]

    assert tokenizer.encode("") == [1]
    assert encode(" ab a") == ["\u2581", "ab", "\u2581a"]
    assert encode("aaab  a") == ["aa", "ab", "\u2581\u2581", "a"]
    assert encode("a\n\nb\n\n\n") == ["a", "\n\n", "b", "\n", "\n", "\n"]
    assert encode("é") == ["<0xC3>", "<0xA9>"]
    assert encode("bba") == ["b", "<0x62>", "<0x61>"]  # joined to what is no token
    assert encode("a<turn|>b") == ["a", "<turn|>", "b"]
    for text in (" ab a", "a\n\n\nbé  a", "bba"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert ids["<turn|>"] == tokenizer.encode("<turn|>")[1]


def test_a_tag_that_ends_nothing():
    """Gemma 4's `</s>`, which in other vocabularies ends a text, whether it is marked or not."""
    for other, expected in ("<|tool_response>", ["</", "s>"]), ("<|other>", ["</s>"]):
        pieces = ["<bos>", other, "</s>", "</", "s>", "s", ">", "<", "/"]
        values = {"model": "gemma4", "tokens": pieces, "merges": ["< /", "s >"], "bos_token_id": 0}
        tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, "test")
        assert [pieces[token] for token in tokenizer.encode("</s>", add_special=False)] == expected


def test_byte_level_bpe():
    bytes_ = list(byte_pieces())
    pieces = [*bytes_, "he", "ll", "hell", "\u0120he", "<|end|>"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": pieces,
        "token_type": np.array([1] * 260 + [3], np.int32),
        "merges": ["h e", "l l", "he ll", "\u0120 he", "not there"],
        "eos_token_id": 260,
    }
    tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "test")
    ids = {piece: i for i, piece in enumerate(pieces)}
    assert tokenizer.encode("hello") == [ids["hell"], ids["o"]]
    assert tokenizer.encode(" he<|end|>\n") == [ids["\u0120he"], 260, ids["\u010a"]]
    assert tokenizer.encode("é") == [bytes_.index("\u00c3"), bytes_.index("\u00a9")]


def vocabulary_of_merges(merges, pre):
    """The metadata of a byte-level vocabulary: the bytes, and what merges make of them."""
    tokens = [*byte_pieces(), *(merge.replace(" ", "") for merge in merges)]
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": np.ones(len(tokens), np.int32)}
    values |= {"merges": merges, "bos_token_id": 0, "eos_token_id": 1}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_words_are_cut_as_llama_cpp_cuts_them():
    """By name of the pre-tokenizer, with merges that most cuts part."""
    known = json.loads(CUTS.read_text())
    for pre, expected in known["ids"].items():
        tokenizer = Tokenizer(vocabulary_of_merges(known["merges"], pre), "test")
        for text, ids in zip(known["texts"], expected, strict=True):
            assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, (pre, text)


@pytest.mark.parametrize(
    "pre,words",
    [
        ("gpt-4o", ["Camel", "Case's", "IDE", "_v", "123", "4"]),
        ("gpt-4o", ["don't", " WORLD's", " (", "123", "4", ")"]),
        ("tekken", ["Camel", "Case", "1", "2"]),
        ("tiny_aya", ["Camel", "Case", "IDENTifier", "_v", "2"]),
        ("tiny_aya", ["like", " ", "1", "234", "567", " and", " ", "89", "000", "."]),
        ("cohere2moe", ["x", "123", "4", "b"]),  # digits before a letter are counted from the left
    ],
)
def test_words_are_cut_as_the_models_own_tokenizers_cut_them(pre, words):
    """Where llama.cpp's patterns are simpler: each word is a token, unless what parts two would be joined first."""
    spelled = [word.replace(" ", "Ġ") for word in words]
    merges = [f"{left[-1]} {right[0]}" for left, right in pairwise(spelled)]
    merges += [f"{word[:n]} {word[n]}" for word in spelled for n in range(1, len(word))]
    tokenizer = Tokenizer(vocabulary_of_merges(list(dict.fromkeys(merges)), pre), "test")
    ids = tokenizer.encode("".join(words), add_special=False, parse_special=False)
    assert [tokenizer.decode([i]).decode() for i in ids] == words


@pytest.mark.parametrize(
    "metadata,complaint",
    [
        ({}, "no vocabulary"),
        ({"model": "bert", "tokens": ["a"]}, "kind 'bert'"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "new"}, "pre-tokenizer 'new'"),
        ({"model": "llama", "tokens": ["a"], "scores": np.zeros(2)}, "scores has 2 values for 1 tokens"),
        ({"model": "llama", "tokens": ["a"], "bos_token_id": 7}, "bos_token_id is 7"),
        ({"model": "llama", "tokens": ["a"]}, "bos_token_id is missing"),
        ({"model": "llama", "tokens": ["a", "b"], "bos_token_id": True}, "bos_token_id is True, not a token's id"),
        ({"model": "llama", "tokens": ["a", "b"], "bos_token_id": -1}, "bos_token_id is -1, not a token's id"),
        ({"model": "llama", "tokens": ["a"], "scores": ["high"]}, "scores is an array of 1 values, not an array of n"),
        ({"model": "llama", "tokens": ["a"], "scores": np.array([np.nan])}, "not an array of numbers"),
        ({"model": "llama", "tokens": ["a"], "token_type": np.ones(1)}, "token_type is an array of 1 float64"),
        ({"model": "llama", "tokens": ["a"], "add_bos_token": np.ones(1)}, "add_bos_token is an array"),
        ({"model": "llama", "tokens": ["a"], "add_space_prefix": "no"}, "add_space_prefix is 'no', not true or false"),
        ({"model": "llama", "tokens": []}, "no vocabulary"),
        ({"model": "gpt2", "tokens": np.arange(3)}, "tokens is an array of 3 int64, not an array of texts"),
        ({"model": "gpt2", "tokens": ["a"], "merges": np.arange(3)}, "merges is an array of 3 int64"),
        ({"model": "gpt2", "tokens": ["a"], "pre": np.arange(3)}, "pre is an array of 3 int64, not a text"),
        ({"model": np.arange(2), "tokens": ["a"]}, "model is an array of 2 int64, not a text"),
        ({"model": 7, "tokens": ["a"]}, "model is 7, not a text"),
    ],
)
def test_vocabularies_that_cannot_be_used(metadata, complaint):
    with pytest.raises(kqprefill.ModelError, match=complaint):
        Tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "test")


def test_a_name_that_is_an_array():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "general.name": np.arange(2)}
    with pytest.raises(kqprefill.ModelError, match=r"general\.name is an array of 2 int64, not a text"):
        Tokenizer(metadata, "test")


NO_BYTES = {"model": "llama", "tokens": ["<s>", "</s>", "a", "b", "\u2581"], "token_type": np.array([3, 3, 1, 1, 1])}
NO_BYTES |= {"scores": np.zeros(5, np.float32), "bos_token_id": 0, "add_space_prefix": False}


@pytest.mark.parametrize(
    "text,at,character",
    [("abc", 2, "c"), ("ab </s>xa", 7, "x"), ("aé", 1, "é"), ("a😀", 1, "😀"), ("</s>\nab", 4, r"\\n")],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_character_that_no_token_stands_for(kind, text, at, character):
    """Neither a piece, nor its bytes, nor an unknown token: it would be left out without a word."""
    values = {**NO_BYTES, "model": kind}
    if kind == "gpt2":
        values |= {"tokens": ["<s>", "</s>", "a", "b", "\u0120"], "merges": ["a b"]}
    tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, "test")
    assert tokenizer.encode("ab </s>a", add_special=False) == [2, 3, 4, 1, 2]
    with pytest.raises(kqprefill.InputError, match=f"no token for '{character}', character {at} of the text"):
        tokenizer.encode(text)


def test_a_space_before_a_text_that_no_token_stands_for():
    values = {**NO_BYTES, "tokens": ["<s>", "</s>", "a", "b", "c"], "add_space_prefix": True}
    tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, "test")
    with pytest.raises(kqprefill.InputError, match="no token for the space before a text"):
        tokenizer.encode("ab")


def test_a_word_that_is_a_token_without_its_bytes():
    """The names whose words are looked up whole (Llama 3) need no tokens for the bytes of such a word."""
    values = {"model": "gpt2", "pre": "llama-bpe", "tokens": ["xyz", "a"], "add_bos_token": False}
    tokenizer = Tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, "test")
    assert tokenizer.encode("xyz") == [0]
    with pytest.raises(kqprefill.InputError, match="no token for 'x', character 0"):
        tokenizer.encode("xy")


def test_text_that_is_none():
    tokenizer, _ = sentencepieces([])
    with pytest.raises(kqprefill.InputError, match="character 1"):
        tokenizer.encode("a\udc80")


KINDS = (
    "llama-spm phi-3 gemma-4 llama-bpe qwen2 qwen35 gpt-2 starcoder refact command-r mpt falcon deepseek-llm "
    "deepseek-coder"
).split()


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpps_vocabularies(name):
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("set KQPREFILL_VOCABS to llama.cpp's models/ folder")
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(word) for word in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    with GGUFFile(path) as file:
        tokenizer = Tokenizer(file.metadata, path)
    assert [tokenizer.encode(text, add_special=False) for text in texts[: len(expected)]] == expected


def test_prompts_on_the_command_line(tmp_path):
    (tmp_path / "prompt").write_text("Hello")
    by_ids = kq("run", EXAMPLE, "--backend", "cpu", "--tokens", "72,101,108,108,111").stdout
    for prompt, stdin in (("Hello", None), ("-", b"Hello"), (f"@{tmp_path / 'prompt'}", None)):
        assert kq("run", EXAMPLE, "--backend", "cpu", "--prompt", prompt, stdin=stdin).stdout == by_ids != b""
    assert kq("tokenize", EXAMPLE, "Hello").stdout == b"72,101,108,108,111\n"
    assert kq("tokenize", EXAMPLE, stdin="Hé".encode()).stdout == b"72,195,169\n"
    text = kq("run", EXAMPLE, "--backend", "cpu", "--prompt", "Hello", "--text")
    assert text.returncode == 0 and text.stdout != by_ids


@pytest.mark.parametrize(
    "args,stdin,status,complaint",
    [
        ([], None, 2, b"--tokens IDS, --prompt TEXT, --file FILE, or piped"),
        (["--tokens", "1", "--prompt", "x"], None, 2, b"give the prompt once"),
        (["--prompt", "-"], b"\xff", 1, b"no UTF-8"),
        (["--prompt", "-"], b"", 1, b"empty"),
        (["--prompt", ""], None, 2, b"empty"),
    ],
)
def test_prompts_that_are_none(args, stdin, status, complaint):
    done = kq("run", EXAMPLE, "--backend", "cpu", *args, stdin=stdin)
    assert done.returncode == status and complaint in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("model", None, "has no vocabulary"),
        ("model", "rwkv", "is of kind 'rwkv'"),
        ("pre", "none-such", "pre-tokenizer 'none-such' is not supported"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_names_no_option_that_is_not_there(tmp_path, key, value, words):
    model = SyntheticFile.named("tiny:Q4_0")
    if value is None:
        del model.metadata[f"tokenizer.ggml.{key}"]
    else:
        model.metadata[f"tokenizer.ggml.{key}"] = value
    write_gguf(model, tmp_path / "model.gguf")
    done = kq("tokenize", tmp_path / "model.gguf", "x")
    said = done.stderr.decode()
    assert done.returncode == 1 and words in said and "it takes token ids, not text" in said and "--" not in said


def test_tokenizing_without_the_library_says_what_to_install(tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError('not here')")
    model = SyntheticFile.named("tiny:Q4_0")
    model.metadata["tokenizer.ggml.tokens"][0] = "ab"
    model.metadata["tokenizer.ggml.merges"] = ["a b"]
    write_gguf(model, tmp_path / "merges.gguf")
    done = subprocess.run(
        [sys.executable, "-m", "kqprefill", "tokenize", tmp_path / "merges.gguf", "x"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 2 and b"pip install 'kqprefill[text]'" in done.stderr


def test_a_token_a_byte_needs_no_library(monkeypatch):
    """And gives what the library gives."""
    from kqprefill.text.bpe import BytePairs

    pieces, text = [*byte_pieces(), "Ġa"], "Hello, wörld 123 \n\t <|x|> 日本 😀 a"
    with_library = BytePairs([*pieces[:256], "zq"], ["z q"], "default", ValueError)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for merges in [], ["a 1"]:  # the example's, which makes no token
        without = BytePairs(pieces[:256], merges, "default", ValueError)
        assert without.encode(text) == with_library.encode(text) and len(without.encode(text)) == len(text.encode())
    with pytest.raises(kqprefill.InputError, match="tokenizers"):
        BytePairs(pieces, ["Ġ a"], "default", ValueError)
