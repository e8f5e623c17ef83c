"""Synthetic models: their family says which tensors they have, and a file that is written has the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
import sys

from gguf import GGUFReader, GGUFValueType
import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.gguf import GGUFFile, dequantize
from kqprefill.gguf.types import GGML
from kqprefill.models import FAMILIES, describe_model, read_model
from kqprefill.synthetic import RECIPES, SHAPES, Shape, SyntheticFile, pool, write_gguf
from small_models import EXPERTS, more_metadata


def small(architecture: str) -> Shape:
    """A few layers of that architecture."""
    shape = replace(SHAPES["tiny"], architecture=architecture, window=64)
    shape = replace(shape, more=more_metadata(architecture))
    return replace(shape, experts=4, used=2) if architecture in EXPERTS else shape


def synthetic(architecture: str) -> SyntheticFile:
    """A model of every kind of matrix; routers are F32 as in all files."""
    return SyntheticFile(
        small(architecture), lambda name, _: GGML.F32 if name == "ffn_gate_inp" else GGML.Q4_K, architecture
    )


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_of_every_family(architecture: str) -> None:
    file = synthetic(architecture)
    family = read_model(file)
    shapes = {name.rstrip("?"): shape for name, shape in family.tensor_shapes().items()}
    assert {name: tensor.shape for name, tensor in file.tensors.items()}.items() <= shapes.items()
    assert all(name in file.tensors for name in family.tensor_shapes() if not name.endswith("?"))
    assert len(family.layer_states) == len(family.blocks) == file.metadata[f"{architecture}.block_count"]
    assert (family.experts is not None) == (architecture in EXPERTS)
    names = [matrix.name for matrix in family.matrices()]
    assert len(set(names)) == len(names)
    rates = [tensor.data.view(np.float32) for name, tensor in file.tensors.items() if name.endswith(".ssm_a")]
    assert all((rate < 0).all() for rate in rates)  # of decay, in every layer


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_description_needs_no_tensors(architecture: str) -> None:
    file = synthetic(architecture)
    described = describe_model(file.metadata, "nowhere", vocab_size=256)
    assert described.tensor_shapes() == read_model(file).tensor_shapes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt-oss"])
def test_a_written_file_is_read_back(architecture: str, tmp_path: Path) -> None:
    file, path = synthetic(architecture), tmp_path / "model.gguf"
    write_gguf(file, path)
    with GGUFFile(path) as written:
        for key, value in file.metadata.items():
            again = written.metadata[key]
            assert list(again) == value if isinstance(value, list) else again == pytest.approx(value), key
        assert list(written.tensors) == list(file.tensors)
        for tensor in file.tensors.values():
            again = written.tensors[tensor.name]
            assert (again.shape, again.type, again.nbytes) == (tensor.shape, tensor.type, tensor.nbytes)
            assert np.array_equal(again.data, tensor.data)
        assert len(read_model(written).matrices()) == len(read_model(file).matrices())
    for again in GGUFReader(path).tensors:  # the gguf package's own
        assert np.array_equal(again.data.reshape(-1).view(np.uint8), file.tensors[again.name].data.reshape(-1))


def test_tiny_is_as_large_as_the_example() -> None:
    with SyntheticFile.named("tiny:Q4_K_M") as file, GGUFFile(EXAMPLE) as example:
        assert {t.name: t.shape for t in file.tensors.values()} == {t.name: t.shape for t in example.tensors.values()}


def test_the_example_is_what_synth_writes(tmp_path: Path) -> None:
    with SyntheticFile.named("tiny:Q4_K_M") as file:
        write_gguf(file, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == EXAMPLE.read_bytes()


def test_llama_cpp_finds_the_vocabulary_that_it_asks_for(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge, and the ids of BOS and EOS; and yet each byte of any text is its own token, with no library."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fields = GGUFReader(EXAMPLE).fields
    (merge,) = fields["tokenizer.ggml.merges"].contents()
    assert len(merge.split(" ")) == 2
    for key in ("bos", "eos"):
        field = fields[f"tokenizer.ggml.{key}_token_id"]
        assert field.types == [GGUFValueType.UINT32] and 0 <= field.contents() < 256
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        for text in ("", "a1 a 1 1a aa11", "\0\1\u0100", "wörld 日本 😀", *rng.integers(0, 128, (20, 40), np.uint8)):
            text = text if isinstance(text, str) else bytes(text).decode()
            assert model.tokenize(text) == list(text.encode())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", ["Q4_K_M", "MXFP4_MOE", "Q6_K"])
def test_known_shapes_are_models(name: str, recipe: str) -> None:
    file = SyntheticFile.named(f"{name}:{recipe}")
    family = read_model(file)
    assert family.config.vocab_size == SHAPES[name].vocab
    assert (family.output is family.token_embd) == SHAPES[name].tied
    assert all(w.tensor.type != GGML.F32 for w in family.matrices() if "ffn_gate_inp" not in w.name)


@pytest.mark.parametrize(
    "name,wrong",
    [
        ("qwen3-8b:Q9_Z", "qwen3-8b is a shape, but there is no recipe 'Q9_Z'; did you mean Q8_K"),
        ("qwen3-8b:xyz", "no recipe 'XYZ'; there are Q4_K_M, MXFP4_MOE, BF16"),
        ("qwen9-8b:Q4_K_M", "there is no shape 'qwen9-8b'; did you mean qwen3-8b or"),
        (":", "there is no shape ''; there are tiny, "),
        ("no-such-file", "no file, and there is no shape 'no-such-file'; there are tiny, "),
    ],
)
def test_an_unknown_name_is_one_line(name: str, wrong: str) -> None:
    """Which says which half is wrong, and what comes near."""
    with pytest.raises(kqprefill.InputError) as refusal:
        SyntheticFile.named(name)
    message = str(refusal.value)
    assert message.startswith(f"{name}: ") and wrong in message and "\n" not in message


def test_the_recipe_may_be_left_out() -> None:
    assert SyntheticFile.named("qwen3-8b").path == SyntheticFile.named("qwen3-8b:q4_k_m").path == "qwen3-8b:Q4_K_M"


def test_half_of_the_layers_get_more_bits() -> None:
    tensors = SyntheticFile.named("qwen3-8b:Q4_K_M").tensors
    for name in ("attn_v", "ffn_down"):
        larger = [i for i in range(36) if tensors[f"blk.{i}.{name}.weight"].type == GGML.Q6_K]
        assert larger[:5] == [0, 1, 2, 3, 6] and larger[-5:] == [31, 32, 33, 34, 35] and len(larger) == 18
    assert tensors["output.weight"].type == GGML.Q6_K and tensors["blk.0.attn_q.weight"].type == GGML.Q4_K


def test_rows_that_no_block_fits_get_smaller_blocks() -> None:
    shape = replace(SHAPES["tiny"], ffn=160)
    kinds = (GGML.Q4_K, GGML.Q6_K, GGML.IQ4_XS)
    types = [SyntheticFile(shape, lambda *_, k=k: k, "odd").tensors["blk.0.ffn_down.weight"].type for k in kinds]
    assert types == [GGML.Q5_0, GGML.Q8_0, GGML.IQ4_NL]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r in GGML.__members__])
def test_weights_of_every_type_are_finite_and_small(recipe: str) -> None:
    kind = GGML[recipe]
    weights = dequantize(pool(kind)[:2048].reshape(1, -1), kind)
    assert np.isfinite(weights).all() and 0.005 < weights.std() < 0.5 and abs(weights.mean()) < 0.02


def test_parts_of_tensors_are_their_data() -> None:
    file = synthetic("gpt-oss")
    experts, bias = file.tensors["blk.0.ffn_up_exps.weight"], file.tensors["blk.0.ffn_up_exps.bias"]
    assert np.array_equal(experts.item(3).data, experts.data[3]) and experts.item(3).shape == experts.shape[1:]
    assert np.array_equal(experts.item(3).rows(5, 9).data, experts.data[3][5:9])
    assert np.array_equal(bias.item(2).data, bias.data[2])
    norm = file.tensors["output_norm.weight"]
    assert np.array_equal(norm.rows(8, 16).data, norm.data[32:64])


def test_what_parts_are_taken_from_is_contiguous() -> None:
    """A part is read ahead from the file's own bytes, without a copy, however its rows lie there."""
    with GGUFFile(ROOT / "tests/data/qwen3next-moe-q3_k_m.gguf") as file:
        matrices = [weight.tensor for weight in read_model(file).matrices()]
        copies = [tensor for tensor in matrices if not np.shares_memory(tensor.data, tensor.stored)]
        assert [tensor.name.partition("[")[0] for tensor in copies[:2]] == ["blk.0.ssm_ba.weight"] * 2
        for tensor in matrices:
            stored = tensor.stored
            assert stored.flags.c_contiguous and np.shares_memory(stored, tensor.stored)
