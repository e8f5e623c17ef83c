"""What a sound GGUF may say that a family cannot run: refused in one line, not answered wrongly, and no traceback."""

import gguf
from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from conftest import BACKENDS, CONFORMANCE_FOLDERS, EXAMPLE
import kqprefill
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model


def variant(path, tensors=None, metadata=None, without=()):
    """The example model with other metadata (value None: left out), more float32 tensors, or without some."""
    with GGUFFile(EXAMPLE) as file:
        architecture = (metadata or {}).get("general.architecture", "qwen3")
        writer = gguf.GGUFWriter(None, architecture)
        values = {**{key: file.metadata[key] for key in file.metadata}, **(metadata or {})}
        for key, value in values.items():
            if value is None or key == "general.architecture":
                continue
            add = {float: writer.add_float64, str: writer.add_string, int: writer.add_uint32}.get(type(value))
            add = writer.add_bool if isinstance(value, bool) else add
            add(key, value) if add else writer.add_array(key, np.asarray(value).tolist())
        for tensor in file.tensors.values():
            if tensor.name not in without:
                data = np.array(tensor.data)
                writer.add_tensor(
                    tensor.name, data.view(np.float32) if tensor.type == GGML.F32 else data, raw_dtype=tensor.type
                )
        for name, data in (tensors or {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def ones(*shape):
    return np.ones(shape, np.float32)


REFUSED = {
    "architecture": ({"metadata": {"general.architecture": "mamba"}}, "architecture 'mamba' is not supported"),
    "missing tensor": ({"without": ["blk.1.ffn_up.weight"]}, "blk.1.ffn_up.weight is missing"),
    "missing metadata": ({"metadata": {"qwen3.attention.head_count": None}}, "attention.head_count is missing"),
    "misshapen tensor": ({"metadata": {"qwen3.feed_forward_length": 256}}, "ffn_gate.weight is [512, 256]"),
    "heads that do not group": ({"metadata": {"qwen3.attention.head_count": 3}}, "not a multiple"),
    "experts": ({"tensors": {"blk.0.ffn_gate_exps.weight": ones(2, 512, 256)}}, "ffn_gate_exps.weight has no place"),
    "bias on a norm": ({"tensors": {"blk.0.attn_norm.bias": ones(256)}}, "attn_norm.bias has no place"),
    "bias on the embedding": ({"tensors": {"token_embd.bias": ones(256)}}, "token_embd.bias has no place"),
    "frequencies of another type": ({"tensors": {"rope_freqs.weight": np.ones(32, np.int32)}}, "has type I32"),
    "frequencies of another length": ({"tensors": {"rope_freqs.weight": ones(31)}}, "rope_freqs.weight is [31]"),
    "frequencies of 0": ({"tensors": {"rope_freqs.weight": 0 * ones(32)}}, "positive factors"),
    "rotary scaling of a new kind": (
        {"metadata": {"qwen3.rope.scaling.type": "longrope"}},
        "'longrope' is not supported",
    ),
    "rotary base 1": (
        {
            "metadata": {
                "qwen3.rope.freq_base": 1.0,
                "qwen3.rope.scaling.type": "yarn",
                "qwen3.rope.scaling.factor": 4.0,
            }
        },
        "out of range",
    ),
    "rotary beta 1e-310": (
        {"metadata": {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.yarn_beta_slow": 1e-310}},
        "not a positive number of float32's range",
    ),
    "YaRN that divides by 0": (
        {
            "metadata": {
                "qwen3.rope.scaling.type": "yarn",
                "qwen3.rope.scaling.factor": float(np.exp(-10.0)),
                "qwen3.rope.scaling.yarn_log_multiplier": 1.0,
            }
        },
        "a rotation is not finite",
    ),
    "YaRN that overflows": (
        {
            "metadata": {
                "qwen3.rope.scaling.type": "yarn",
                "qwen3.rope.scaling.factor": 1e-37,
                "qwen3.rope.freq_base": 1e-37,
            }
        },
        "a rotation is not finite",
    ),
    "a rotary base of float64's range": ({"metadata": {"qwen3.rope.freq_base": 1e-300}}, "float32's range"),
    "a true for a number": ({"metadata": {"qwen3.rope.freq_base": True}}, "rope.freq_base is True, not a positive"),
    "a text for a number": ({"metadata": {"qwen3.rope.freq_base": "10" * 99}}, "rope.freq_base is '1010101010101010"),
    "an array for a number": (
        {"metadata": {"qwen3.rope.freq_base": np.ones(3, np.float32)}},
        "rope.freq_base is an array of 3 float",
    ),
    "an array for a text": (
        {"metadata": {"qwen3.rope.scaling.type": np.ones(3, np.int32)}},
        "rope.scaling.type is an array of 3 int",
    ),
    "another vocab_size": ({"metadata": {"qwen3.vocab_size": 255}}, "vocab_size is 255, but token_embd.weight has 256"),
    "negative epsilon": ({"metadata": {"qwen3.attention.layer_norm_rms_epsilon": -1.0}}, "not a positive number"),
    "more blocks than tensors": ({"metadata": {"qwen3.block_count": 2**31 - 1}}, "block_count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path):
    changes, complaint = REFUSED[case]
    path = variant(tmp_path / "model.gguf", **changes)
    with pytest.raises(kqprefill.ModelError) as refusal:
        kqprefill.load(path, backend="cpu")
    message = str(refusal.value)
    assert complaint in message and message.startswith(str(path)) and "\n" not in message


def test_a_number_for_an_array_is_told_as_it_is():
    with GGUFFile(CONFORMANCE_FOLDERS[0] / "gemma3n-tiny.gguf") as file:
        file.metadata = {**file.metadata, "gemma3n.activation_sparsity_scale": 7}
        with pytest.raises(kqprefill.ModelError, match="activation_sparsity_scale is 7, not an array of at least"):
            read_model(file)


@pytest.mark.parametrize("path", sorted(CONFORMANCE_FOLDERS[0].glob("*.gguf")), ids=lambda path: path.stem)
def test_blocks_past_counting_are_refused_before_they_are_counted(path, monkeypatch):
    """In every family: lists with an element for each layer would take all memory."""
    with GGUFFile(path) as file:
        key = f"{file.metadata['general.architecture']}.block_count"
        monkeypatch.setattr(file, "metadata", {**file.metadata, key: 2**31 - 1})
        with pytest.raises(kqprefill.ModelError, match=f"block_count is {2**31 - 1}, but the file has only"):
            read_model(file)


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_of_matrices_are_added(backend, tmp_path):
    output = np.zeros(256, np.float32)
    output[9] = 1e6
    path = variant(tmp_path / "model.gguf", tensors={"output.bias": output})
    with kqprefill.load(path, backend=backend) as model:
        result = model.prefill([1, 2, 3], logits="last")
    assert result.token == 9 and result.logits[9] == pytest.approx(1e6, rel=1e-5)


@pytest.mark.parametrize("tokens", [list(range(256)), "a string", ["a"]], ids=["integers", "string", "too few"])
def test_a_vocabulary_that_is_none(tokens, tmp_path):
    path = variant(tmp_path / "model.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with kqprefill.load(path, backend="cpu") as model:
        assert model.token_text(200) is None


def test_yarn_whose_ramp_lies_far_outside(tmp_path):
    """A base next to 1 puts both ends of the ramp beyond what an integer of 64 bits holds: every pair is then alike."""
    values = {"qwen3.rope.freq_base": 1 + 2.0**-50, "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 2.0}
    with kqprefill.load(variant(tmp_path / "model.gguf", metadata=values), backend="cpu") as model:
        assert np.isfinite(model.prefill([1, 2, 3], logits="last").logits).all()
