"""Files that hold no model of a family: what `inspect` says that they are, and the one line of every other command."""

import json

from click.testing import CliRunner
import gguf
import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.cli.commands import cli
from kqprefill.errors import ModelError
from kqprefill.models import FAMILIES
from kqprefill.models.unsupported import FILES, KIND_OF, KINDS, LACKING, nearest, refusal
from test_cli import TOKENS, kq


def said_of(path, *options):
    """What `kqprefill inspect` prints, in this process."""
    done = CliRunner().invoke(cli, ["inspect", str(path), *options])
    assert done.exit_code == 0, done.output
    return done.output


def inspected(path):
    """What `kqprefill inspect --json` says."""
    return json.loads(said_of(path, "--json"))


ATTENTION = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output_norm.weight"]


def written(path, metadata, tensors):
    """A small file of that metadata, with tensors of those names."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # the architecture, which not every file has
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name in tensors:
        norm = name.endswith(("norm.weight", "bias"))
        writer.add_tensor(name, np.ones((8,) if norm else (16, 8), np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(architecture, **more):
    """The metadata of a file of that architecture."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return {"general.architecture": architecture, "general.name": "A Name", **own}


WHAT = {  # metadata, tensors' names, kind, what people read, what the error says
    "bert": (named("bert", block_count=12, context_length=512), ATTENTION, "encoder", "an encoder", "gemma-embedding"),
    "t5": (named("t5", decoder_block_count=2), ATTENTION, "encoder-decoder", "an encoder-decoder", "runs decoders"),
    "a decoder": (
        named("plamo2", block_count=2),
        ATTENTION,
        "decoder",
        "a decoder such as PLaMo 2",
        "nearest: granite",
    ),
    "mamba": (
        named("mamba"),
        ["token_embd.weight", "blk.0.ssm_a"],
        "recurrent",
        "a recurrent language",
        "Mamba's scan",
    ),
    "dream": (named("dream"), ATTENTION, "masked", "a language model that fills in masked tokens", "after them"),
    "flux": (named("flux"), ["double_blocks.0.img_attn.qkv.weight"], "images", "a diffusion model", "no next token"),
    "eagle3": (named("eagle3"), ATTENTION, "draft", "a draft model", "give that one's file"),
    "wavtokenizer": (named("wavtokenizer-dec"), ATTENTION, "sound", "a model that makes sound", "no text"),
    "clip": (
        named("clip", vision__block_count=4),
        ["v.blk.0.attn_q.weight"],
        "projector",
        "only what sees",
        "give the",
    ),
    "mmproj": (
        {**named("llama"), "general.type": "mmproj"},
        ["mm.0.weight"],
        "projector",
        "only what sees or hears",
        "give the language model's own file",
    ),
    "lora": (
        {**named("llama"), "general.type": "adapter", "adapter.type": "lora"},
        ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"],
        "adapter",
        "a LoRA adapter for llama",
        "merge it into its model",
    ),
    "imatrix": (
        {"general.type": "imatrix", "imatrix.chunk_count": 3},
        ["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"],
        "importance matrix",
        "an importance matrix",
        "give the model that it is of",
    ),
    "control vector": (named("controlvector"), ["direction.1"], "control vector", "a control vector", "give the model"),
    "vocabulary": (
        {**named("llama"), "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b", "c"]},
        [],
        "vocabulary",
        "a vocabulary without a model",
        "give the model's own file",
    ),
    "nothing": (named("llama"), [], "nothing", "a file without tensors", "give a language model's file"),
    "images without a name": (
        {},
        ["model.diffusion_model.input_blocks.0.0.weight"],
        "images",
        "a diffusion model",
        "no language model; by its tensors it is a diffusion model",
    ),
    "an encoder by what it says": (
        named("newbert", attention__causal=False),
        ATTENTION,
        "encoder",
        "an encoder",
        "its tokens see those after them",
    ),
    "a decoder by its tensors": (named("brandnew"), ATTENTION, "decoder", "a decoder", "kqprefill does not know it"),
    "no idea": (named("brandnew"), ["x.weight"], "unknown", "a model of an architecture", "kqprefill does not know it"),
}


@pytest.mark.parametrize("name", WHAT)
def test_what_a_file_is(name, tmp_path):
    metadata, tensors, kind, words, why = WHAT[name]
    path = written(tmp_path / "x.gguf", metadata, tensors)
    described = inspected(path)
    assert (described["kind"], described["backends"]) == (kind, [])
    assert described["what"].startswith(words.partition(" such as")[0]) and why in described["problem"]
    text = said_of(path)
    assert text.splitlines()[1].startswith(words) and f"kqprefill does not run it: {path}: " in text
    assert all(group in text for group in described["groups"])
    with pytest.raises(ModelError) as error:
        kqprefill.load(path, backend="cpu")
    assert str(error.value) == described["problem"] and "\n" not in str(error.value)


def test_commands_end_with_the_line(tmp_path):
    path = written(tmp_path / "x.gguf", named("plamo2"), ATTENTION)
    for args in (
        ["run", path, "--tokens", TOKENS],
        ["plan", path],
        ["score", path, "-"],
        ["bench", path, "-p", "8"],
    ):
        done = kq(*args)
        lines = [line for line in done.stderr.decode().splitlines() if "GPU" not in line]
        assert done.returncode == 1 and len(lines) == 1, lines
        assert lines[0].startswith(f"kqprefill: {path}: architecture 'plamo2' is not supported: PLaMo 2 needs"), lines


def test_sizes_of_what_does_not_run(tmp_path):
    def sizes(metadata, tensors):
        described = inspected(written(tmp_path / "x.gguf", metadata, tensors))
        return [described[key] for key in ("name", "layers", "context", "vocabulary", "tokenizer", "parameters")]

    encoder = {**named("bert", block_count=12, context_length=512), "tokenizer.ggml.model": "bert"}
    assert sizes(encoder, ATTENTION) == ["A Name", 12, 512, 16, "bert", 3 * 128 + 8]
    assert sizes(named("clip", vision__block_count=27), ["v.patch_embd.weight"])[1] == 27
    assert sizes(WHAT["vocabulary"][0], []) == ["A Name", None, None, 3, "llama", 0]


def test_where_a_model_runs():
    described = inspected(EXAMPLE)
    assert described["backends"] == ["cpu", "cuda"]
    assert (described["kind"], described["note"]) == ("decoder", None) and "Qwen 3 8B" in described["examples"]
    assert "\na decoder such as Qwen 3 8B, " in said_of(EXAMPLE)


@pytest.mark.parametrize(
    "architecture,expected",
    {
        "qwen4": ["qwen35", "qwen3", "qwen2"],
        "qwen3-moe": ["qwen3moe", "qwen35moe", "qwen2moe"],
        "gemma5": ["gemma4", "gemma3", "gemma2"],
        "lama": ["llama", "llama4"],
        "mistral": ["mistral3", "mistral4"],
        "gptoss": ["gpt-oss"],
        "foo": [],
        "": [],
        "x" * 1_000_000: [],
    }.items(),
    ids=lambda value: str(value)[:20],
)
def test_nearest_names(architecture, expected):
    assert nearest(architecture, FAMILIES) == expected


def test_the_line_names_neighbours_and_no_long_list():
    line = refusal(named("qwen4"), ATTENTION, FAMILIES)
    assert line.startswith("architecture 'qwen4' is not supported: kqprefill does not know it; nearest: qwen35 (Qwen")
    assert line.endswith("; docs/models.md lists what runs")
    for architecture in [*LACKING, *KIND_OF, "qwen4", "foo", "x" * 1000]:
        line = refusal(named(architecture), ATTENTION, FAMILIES)
        assert "\n" not in line and len(line) < 300 and sum(f" {name} (" in line for name in FAMILIES) <= 3, line
    assert all(refusal(named(architecture), ATTENTION, FAMILIES) is None for architecture in FAMILIES)


def test_the_tables_say_nothing_of_what_runs():
    """An architecture that has a page now leaves kqprefill/models/unsupported.py."""
    assert not (LACKING.keys() | KIND_OF.keys()) & FAMILIES.keys()
    assert not LACKING.keys() & KIND_OF.keys() and set(KIND_OF.values()) <= KINDS.keys() and not KINDS.keys() & FILES
    for name, lacking in LACKING.items():
        assert lacking.models and set(lacking.nearest.split()) <= FAMILIES.keys(), name
