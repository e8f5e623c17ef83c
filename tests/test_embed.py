"""Vectors of texts: as llama.cpp's, the same however texts are packed, and what the command writes."""

from dataclasses import replace
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import BACKENDS, EXAMPLE, found
import kqprefill
from kqprefill.engine.model import open_model
from kqprefill.engine.reranking import question_of, relevances
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile, write_gguf
from test_cli_shell import in_a_terminal

SHAPE = Shape("qwen3", 2, 256, 4, 2, 64, 512, 256, 4096, 1e6)


def prompts(rng, count=12):
    return [rng.integers(0, 128, int(n)).tolist() for n in rng.integers(1, 300, count)]


def embed(*options, text="", status=0):
    command = [sys.executable, "-m", "kqprefill", "embed", *map(str, options), "--backend", "cpu"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode() if status == 0 else done.stderr.decode().splitlines()[-1]


def assert_vectors_are_llama_cpps(model, asked):
    """Cosine distances of a float32 model."""
    llama_cpp = pytest.importorskip("xllamacpp")
    params = llama_cpp.CommonParams()
    params.model.path = model.file.path
    params.embedding, params.warmup = True, False
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    theirs = llama_cpp.Server(params).handle_embeddings({"input": asked})["data"]
    for own, their in zip(model.embed(asked), theirs, strict=True):
        assert abs(1 - float(np.dot(own.astype(np.float64), their["embedding"]))) <= 1e-5


@pytest.mark.parametrize("pooling,number", [("mean", 1), ("cls", 2), ("last", 3)])
def test_vectors_are_llama_cpps(tmp_path, pooling, number, rng):
    """By the pooling that the file says."""
    path = tmp_path / "model.gguf"
    write_gguf(SyntheticFile(replace(SHAPE, more={"pooling_type": number}), lambda *_: GGML.F32, "vectors"), path)
    with kqprefill.load(path, backend="cpu") as model:
        assert_vectors_are_llama_cpps(model, prompts(rng, 5))


GEMMA = Shape(
    "gemma-embedding",
    *(7, 128, 3, 1, 64, 256, 256, 2048, 1e6),
    tied=True,
    window=40,
    more={"pooling_type": 1, "attention.causal": False, "dense_2_feat_out": 192, "dense_3_feat_out": 128}
    | {"dense_2_feat_in": 128, "dense_3_feat_in": 192},
    optional=r"dense_[23]\.weight",
)


@pytest.mark.parametrize("projected", [False, True])
def test_embedding_gemmas_vectors_are_llama_cpps(tmp_path, projected, rng):
    """Whose tokens see both ways; with and without the matrices that the mean goes through."""
    path = tmp_path / "model.gguf"
    shape = GEMMA if projected else replace(GEMMA, optional="")
    write_gguf(SyntheticFile(shape, lambda *_: GGML.F32, "vectors"), path)
    with kqprefill.load(path, backend="cpu") as model:
        assert_vectors_are_llama_cpps(model, prompts(rng, 5))
        with pytest.raises(kqprefill.ModelError, match=r"it gives vectors \(embed\), no next token"):
            model.prefill([1])


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_both_ways_on_a_gpu(kernels, head_dim, rng):
    """As on the CPU, alone and packed, of lengths on both sides of tiles and windows."""
    file = SyntheticFile(replace(GEMMA, head_dim=head_dim), lambda *_: GGML.F32, "vectors")
    asked = [rng.integers(0, 256, n).tolist() for n in (1, 2, 20, 21, 22, 63, 64, 65, 128, 129, 300)]
    with open_model(file, "cpu") as cpu, open_model(file, "cuda", kernels=kernels) as gpu:
        packed = list(gpu.embed(asked))
        for own, other in zip(cpu.embed(asked), packed):
            assert 1 - float(own @ other) <= 1e-5
        assert all(np.array_equal(next(gpu.embed([ids])), vector) for ids, vector in zip(asked, packed))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", [EXAMPLE, *found("gemma3-q4_k_m qwen35-tied-nextn")], ids=lambda p: p.stem)
def test_packed_or_alone_vectors_are_the_same(path, backend, pooling, rng):
    asked = prompts(rng)
    with kqprefill.load(path, backend=backend) as model:
        alone = [next(model.embed([ids], pooling, "none")) for ids in asked]
        for batch_tokens in (None, 500, 1):
            packed = list(model.embed(asked, pooling, "none", batch_tokens))
            assert all(map(np.array_equal, packed, alone))
        lengths = [float(np.linalg.norm(vector)) for vector in model.embed(asked, pooling)]
        assert np.allclose(lengths, 1, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_are_what_the_output_matrix_would_be_given(backend, rng):
    """The last position's logits are the output matrix times the vector; a mean is that of the prefixes' last ones."""
    with open_model(SyntheticFile(SHAPE, lambda *_: GGML.F32, "vectors"), backend) as model:
        tensor = model.family.output.tensor
        matrix = np.frombuffer(tensor.data.tobytes(), np.float32).reshape(tensor.shape)
        ids = rng.integers(0, 256, 70)
        (last,) = model.embed([ids], "last", "none")
        expected = model.prefill(ids, logits="last").logits
        assert np.abs(matrix @ last - expected).max() <= 2e-3 * np.abs(expected).max()
        (mean,) = model.embed([ids], "mean", "none")
        every = list(model.embed([ids[: n + 1] for n in range(70)], "last", "none"))
        assert np.abs(np.mean(every, axis=0) - mean).max() <= 2e-3 * np.abs(mean).max()


def test_what_is_asked_for_is_checked():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        for pooling, words in ((None, "pooled; give a pooling, one of last"), ("max", "'max' is unknown")):
            with pytest.raises(kqprefill.InputError, match=words):
                next(model.embed([[1]], pooling))
        with pytest.raises(kqprefill.InputError, match="the prompt is empty"):
            list(model.embed([[]], "last"))
        assert list(model.embed([], "last")) == []


@pytest.mark.parametrize("said,closed", [({}, True), ({"tokenizer.ggml.add_eos_token": False}, False)])
def test_a_text_ends_with_the_end_token_where_the_model_wants_it(said, closed):
    """Files that pool the last position and do not say whether a text ends with it."""
    file = SyntheticFile(replace(SHAPE, more={"pooling_type": 3}), lambda *_: GGML.F32, "vectors")
    file.metadata |= {"tokenizer.ggml.eos_token_id": 3, **said}
    with open_model(file, "cpu") as model:
        ids = model.embedding_ids("ab")
        assert ids[:2] == model.tokenize("ab")[:2] and (ids[-1] == 3) == closed
        assert model.embedding_ids([5, 6]) == [5, 6]  # ids are as they are


def test_lines_in_and_out(tmp_path):
    lines = '{"text": "Hello", "id": 7}\n\n{"tokens": [72, 101], "note": {"a": [1]}}\n'
    first, second = map(json.loads, embed(EXAMPLE, "--pooling", "last", text=lines).splitlines())
    assert first["id"] == 7 and second["note"] == {"a": [1]} and [first["index"], second["index"]] == [0, 1]
    assert second["n_tokens"] == 2 and len(second["embedding"]) == 256
    texts = tmp_path / "texts.txt"
    texts.write_text("Hello\nYou\n")
    out = tmp_path / "vectors.npy"
    embed(EXAMPLE, texts, "--text", "--pooling", "last", "-o", out)
    assert np.allclose(np.load(out)[0], first["embedding"], atol=1e-7) and np.load(out).shape == (2, 256)
    assert "it exists; --force replaces it" in embed(EXAMPLE, texts, "--pooling", "last", "-o", out, status=2)
    assert "does not say how its outputs are pooled" in embed(EXAMPLE, text=lines, status=2)
    for line, words in (('{"text": 3}', "must be a text"), ("[]", "must be a JSON object"), ("{}", 'either "text" or')):
        assert words in embed(EXAMPLE, "--pooling", "last", text=line + "\n", status=1)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".npy.gz", ".bin"])
def test_an_output_whose_ending_says_no_format_is_refused(tmp_path, ending):
    out = tmp_path / f"vectors{ending}"
    said = embed(EXAMPLE, "--text", "--pooling", "last", "-o", out, text="Hello\n", status=2)
    assert f"-o {out}: its ending says no format; there are .jsonl" in said and not out.exists()


@pytest.mark.parametrize("name", ["vectors", "vectors.jsonl", "vectors.JSON", "vectors.npy", "vectors.npz"])
def test_outputs_by_their_ending(tmp_path, name):
    out = tmp_path / name
    embed(EXAMPLE, "--text", "--pooling", "last", "-o", out, text="Hello\nYou\n")
    if "npz" in name:
        vectors = np.load(out)["embeddings"]
    elif "npy" in name:
        vectors = np.load(out)
    else:
        vectors = np.array([json.loads(line)["embedding"] for line in out.read_text().splitlines()])
    assert vectors.shape == (2, 256)


def test_half_of_a_pair_is_handed_on():
    """Which JSON can spell, and UTF-8 cannot."""
    line = embed(EXAMPLE, "--pooling", "last", text='{"text": "Hello", "id": "\\ud800"}\n')
    assert json.loads(line)["id"] == "\ud800"


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "vectors.parquet"
    embed(EXAMPLE, "--text", "--pooling", "mean", "-o", out, text="Hello\nYou\n")
    table = parquet.read_table(out)
    assert table.column_names == ["index", "n_tokens", "embedding"] and table.num_rows == 2


RERANKER = replace(
    SHAPE,
    more={"pooling_type": 4, "classifier.output_labels": ["yes", "no"]},
    optional=r"cls\.output\.weight",
)
TEMPLATE = "Query: {query}\nDocument: {document}\nAnswer:"
DOCUMENTS = ["Paris is in France.", "Bread.", "The capital of France is Paris, on the Seine."]


def reranker(path, shape):
    file = SyntheticFile(shape, lambda *_: GGML.F32, "reranker")
    file.metadata["tokenizer.chat_template.rerank"] = TEMPLATE
    write_gguf(file, path)
    return path


def test_relevances_are_llama_cpps(tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp")
    path = reranker(tmp_path / "reranker.gguf", RERANKER)
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.embedding, params.warmup, params.pooling_type = True, False, 4
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    theirs = llama_cpp.Server(params).handle_rerank({"query": "capital", "documents": DOCUMENTS})
    expected = {result["index"]: result["relevance_score"] for result in theirs["results"]}
    with kqprefill.load(path, backend="cpu") as model:
        for index, own in enumerate(relevances(model, "capital", DOCUMENTS)):
            assert abs(own - expected[index]) <= 1e-3  # its keys and values are halves


def test_a_file_without_a_classifier_is_asked_for_its_tokens(tmp_path):
    """The classifier's rows are the output matrix' of "yes" and "no"; here they are of two bytes, which are tokens."""
    path = reranker(tmp_path / "reranker.gguf", SHAPE)
    with kqprefill.load(path, backend="cpu") as model:
        with pytest.raises(kqprefill.InputError, match="'yes' is not one token"):
            relevances(model, "q", ["d"])
        question = model.tokenize(question_of(model, "{document}", "d"))
        assert bytes(question).decode() == "Query: {document}\nDocument: d\nAnswer:"
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        assert "<Query>: q\n<Document>: d<|im_end|>" in question_of(model, "q", "d")


def test_rerank_on_the_command_line(tmp_path):
    path = reranker(tmp_path / "reranker.gguf", RERANKER)
    command = [sys.executable, "-m", "kqprefill", "rerank", str(path), "-p", "capital", "--backend", "cpu", "--text"]
    text = "".join(f"{document}\n" for document in DOCUMENTS).encode()

    def lines(*options):
        done = subprocess.run([*command, *options], input=text, capture_output=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    scores = [line["score"] for line in lines()]
    assert [line["index"] for line in lines()] == [0, 1, 2] and all(0 < score < 1 for score in scores)
    assert [line["text"] for line in lines()] == DOCUMENTS
    best = lines("--top", "2")
    assert [line["score"] for line in best] == sorted(scores, reverse=True)[:2]
    assert [line["rank"] for line in best] == [0, 1]
    assert all(line["text"] == DOCUMENTS[line["index"]] for line in best)


def test_reranked_documents_on_a_terminal(tmp_path):
    """A table for people, which shows what a text could do to a terminal and does not do it."""
    path = reranker(tmp_path / "reranker.gguf", RERANKER)
    texts = tmp_path / "texts"
    texts.write_text("Paris is in France.\nBread\x1b[2J\n")
    ours = ["rerank", path, texts, "--text", "-p", "capital", "--backend", "cpu", "-q"]
    status, out = in_a_terminal(*ours, "--top", "2")
    assert status == 0 and re.search(r"\| +rank \| +score \| +index \| text", out), out
    assert "Paris is in France." in out and "Bread\\x1b[2J" in out and "\x1b[2J" not in out
    status, out = in_a_terminal(*ours)
    assert status == 0 and out.count('"score"') == 2 and "\x1b[2J" not in out
