"""Synthetic models: their family says which tensors they have, and a file that is written has the same weights."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
import math
from pathlib import Path
import sys

from gguf import GGUFReader, GGUFValueType
import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.core import KeysValues, Recurrent
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt-oss", "gemma4"])
def test_a_written_file_is_read_back(architecture: str, tmp_path: Path) -> None:
    file, path = synthetic(architecture), tmp_path / "model.gguf"
    write_gguf(file, path)
    with GGUFFile(path) as written:
        for key, value in file.metadata.items():
            again = written.metadata[key]
            assert list(again) == value if isinstance(value, list) else again == pytest.approx(value), key
            assert isinstance(again, bool) == isinstance(value, bool)
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


# Of layers of each kind: how many, and their sizes (configurations of the models, shared/families-2026.md).
# (how many, heads, heads of keys and values, size of heads, window)
ATTENTION = {
    "qwen3.6-27b": [(16, 24, 4, 256, None)],
    "qwen3.6-35b-a3b": [(10, 16, 2, 256, None)],
    "gemma4-31b": [(10, 32, 4, 512, None), (50, 32, 16, 256, 1024)],
    "gemma4-26b-a4b": [(5, 16, 2, 512, None), (25, 16, 8, 256, 1024)],
    "gemma4-e4b": [(4, 8, 2, 512, None), (20, 8, 2, 256, 512)],  # and 18 that share keys and values
    "glm-4.5-air": [(46, 96, 8, 128, None)],
}
# Latent attention: layers, heads, then the ranks of queries and of keys and values, elements of a head that are not
# rotated, that are, and of a value; what the scores are multiplied by beyond 1 / sqrt(192), YaRN being 40 times 4096.
LATENT = {
    "deepseek-v2-lite": (27, 16, 0, 512, 128, 64, 128, (1 + 0.0707 * math.log(40)) ** 2),
    "deepseek-v3": (61, 128, 1536, 512, 128, 64, 128, (1 + 0.1 * math.log(40)) ** 2),
}
# Width of the residual stream, vocabulary, context, base of the rotation, rotated elements, epsilon; then parameters in
# billions, of a file without draft heads and towers.
STREAM = {
    "qwen3.6-27b": (5120, 248320, 262144, 1e7, 64, 1e-6, 26.90),
    "qwen3.6-35b-a3b": (2048, 248320, 262144, 1e7, 64, 1e-6, 34.66),
    "gemma4-31b": (5376, 262144, 262144, 1e6, 512, 1e-6, 30.70),
    "gemma4-26b-a4b": (2816, 262144, 262144, 1e6, 512, 1e-6, 25.23),
    "gemma4-e4b": (2560, 262144, 131072, 1e6, 512, 1e-6, 7.46),
    "deepseek-v2-lite": (2048, 102400, 163840, 1e4, 64, 1e-6, 15.71),
    "deepseek-v3": (7168, 129280, 163840, 1e4, 64, 1e-6, 671.03),
    "glm-4.5-air": (4096, 151552, 131072, 1e6, 64, 1e-5, 106.85),
}
# Experts, those that a token uses, their width, that of those every token uses, leading dense layers and their width;
# sigmoid, scale, normalised, groups, groups used.
ROUTED = {
    "qwen3.6-35b-a3b": (256, 8, 512, 512, 0, 0, False, 1, True, 1, 1),
    "gemma4-26b-a4b": (128, 8, 704, 0, 0, 2112, False, 1, True, 1, 1),
    "deepseek-v2-lite": (64, 6, 1408, 2 * 1408, 1, 10944, False, 1, False, 1, 1),
    "deepseek-v3": (256, 8, 2048, 2048, 3, 18432, True, 2.5, True, 8, 4),
    "glm-4.5-air": (128, 8, 1408, 1408, 1, 10944, True, 1, True, 1, 1),
}
DENSE = {"qwen3.6-27b": 17408, "gemma4-31b": 21504, "gemma4-e4b": 10240}
NEW = list(STREAM)


@pytest.mark.parametrize("name", NEW)
def test_shapes_are_as_published(name: str) -> None:
    file = SyntheticFile.named(f"{name}:Q4_K_M")
    family, c = read_model(file), read_model(file).config
    *stream, parameters = STREAM[name]
    rotated = family.latent.rotary if name in LATENT else 2 * family.rotary_pairs
    base = family.meta.number("rope.freq_base")
    assert [c.embedding_length, c.vocab_size, c.context_length, base, rotated, c.norm_epsilon] == stream
    assert round(sum(math.prod(t.shape) for t in file.tensors.values()) / 1e9, 2) == parameters
    states = Counter((s.heads, s.head_dim, s.window) for s in family.layer_states if type(s) is KeysValues)
    assert states == {(kv, head, window): n for n, _, kv, head, window in ATTENTION.get(name, [])}
    assert all(heads == c.head_count for _, heads, *_ in ATTENTION.get(name, []))
    if name in LATENT:
        layers, *sizes, temperature = LATENT[name]
        own = family.latent
        assert len(family.blocks) == layers
        assert [own.heads, own.query_rank, own.rank, own.key_dim, own.rotary, own.value_dim] == sizes
        assert family.attention_scale == pytest.approx(temperature / math.sqrt(192))
    if name in DENSE:
        assert {t.shape[0] for n, t in file.tensors.items() if n.endswith(".ffn_up.weight")} == {DENSE[name]}
        assert family.experts is None


@pytest.mark.parametrize("name", ROUTED)
def test_experts_are_as_published(name: str) -> None:
    file = SyntheticFile.named(f"{name}:Q4_K_M")
    e = read_model(file).experts
    assert e is not None
    stacks, shared, dense = (
        [t.shape for n, t in file.tensors.items() if n.endswith(f".{end}.weight")]
        for end in ("ffn_up_exps", "ffn_up_shexp", "ffn_up")
    )
    count, used, width, shared_width, leading, dense_width, *routing = ROUTED[name]
    assert {shape[:2] for shape in stacks} == {(count, width)} and e.used == used
    assert {shape[0] for shape in shared} == ({shared_width} if shared_width else set())
    assert {shape[0] for shape in dense} == ({dense_width} if dense_width else set())
    assert len(dense) == (leading if shared_width else file.block_count)
    assert [e.sigmoid, e.scale, e.normalise, e.groups, e.groups_used] == routing
    biased = [n for n in file.tensors if n.endswith("exp_probs_b.bias")]
    assert len(biased) == (len(stacks) if name in ("deepseek-v3", "glm-4.5-air") else 0)


def test_small_parts_of_the_shapes() -> None:
    """Recurrent layers; Gemma 4's rotation in windows, soft-cap, keys that are values, embeddings for each layer."""
    for name, value_heads in (("qwen3.6-27b", 48), ("qwen3.6-35b-a3b", 32)):
        states = read_model(SyntheticFile.named(name)).layer_states
        (kind,) = {s for s in states if isinstance(s, Recurrent)}
        assert [isinstance(s, Recurrent) for s in states] == [(i + 1) % 4 != 0 for i in range(len(states))]
        assert (kind.heads, kind.key_dim, kind.value_dim) == (value_heads, 128, 128)
    for name, layers in (("gemma4-31b", 60), ("gemma4-26b-a4b", 30), ("gemma4-e4b", 42)):
        file = SyntheticFile.named(name)
        family, full = read_model(file), [(i + 1) % 6 == 0 for i in range(layers)]
        assert [family.window(i) is None for i in range(layers)] == full and family.final_softcap == 30
        divided = file.tensors["rope_freqs.weight"].data.view(np.float32)
        assert np.array_equal(divided, [1] * 64 + [np.float32(1e30)] * 192)
        values = [f"blk.{i}.attn_v.weight" in file.tensors for i in range(layers)]
        assert values == ([i < 24 for i in range(42)] if name == "gemma4-e4b" else [not sees_all for sees_all in full])
    assert file.tensors["per_layer_token_embd.weight"].shape == (262144, 256 * 42)
    assert file.tensors["per_layer_model_proj.weight"].type == GGML.BF16
    assert family.sources[24:] == [23 if sees_all else 22 for sees_all in full[24:]]


@pytest.mark.parametrize("name", SHAPES)
def test_first_layers_are_the_whole_models(name: str) -> None:
    """Their tensors, types included, in as little memory at most."""
    whole = SyntheticFile.named(name)
    count, family = SHAPES[name].layers, read_model(whole)
    assert whole.shares() == (1, 1) and SyntheticFile.named(name, count).whole is None
    for layers in {1, count // 2, count - 1}:
        file = SyntheticFile.named(name, layers)
        first = read_model(file)
        assert len(first.blocks) == layers == file.block_count
        assert [first.window(i) for i in range(layers)] == [family.window(i) for i in range(layers)]
        for tensor in file.tensors.values():
            same = whole.tensors[tensor.name]
            assert tensor.type == same.type
            assert tensor.shape == same.shape or tensor.name.startswith("per_layer_")  # as wide as there are layers
        assert file.memory() <= whole.memory() <= sum(tensor.nbytes for tensor in whole.tensors.values())
        assert file.most_layers(SyntheticFile.memory, file.memory()) >= layers


def test_what_first_layers_say_of_the_whole() -> None:
    """Nothing before there is one of each kind; by bytes less than by number where the first ones have no experts."""
    assert SyntheticFile.named("deepseek-v3", 3).shares() is None
    assert SyntheticFile.named("qwen3.6-27b", 3).shares() is None
    shares = SyntheticFile.named("deepseek-v3", 8).shares()
    assert shares is not None and shares == pytest.approx((0.0927, 8 / 61), abs=1e-4)
    assert SyntheticFile.named("deepseek-v3").memory() < 12e9  # of 404 GB
    for layers in (0, 62):
        with pytest.raises(kqprefill.InputError, match=f"--layers {layers}: it has 61 layers"):
            SyntheticFile.named("deepseek-v3", layers)


def test_weights_that_choose_experts_choose_all(rng: np.random.Generator) -> None:
    with SyntheticFile.named("deepseek-v3:Q4_K_M", 4) as file:
        bias = file.tensors["blk.3.exp_probs_b.bias"].data.view(np.float32)
    chosen = np.argsort(1 / (1 + np.exp(-rng.standard_normal((2000, 256)))) + bias)[:, -8:]
    assert (np.bincount(chosen.reshape(-1), minlength=256) / (2000 * 8 / 256)).min() > 0.2


def test_threads_have_one_array_between_them() -> None:
    """Two devices' threads ask for the same weights at once: each of an array's pages is locked for either."""
    with SyntheticFile.named("qwen3-0.6b:Q4_K") as file, ThreadPoolExecutor(4) as pool:
        tensor = file.tensors["blk.0.ffn_up.weight"]
        first, *others = pool.map(lambda _: tensor.data, range(4))
        assert all(other.ctypes.data == first.ctypes.data for other in others)
