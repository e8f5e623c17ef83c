"""Multi-head latent attention: both layouts of its tensors, YaRN's temperatures, what caches keep."""

import math

import numpy as np
import pytest

from conftest import ROOT
from fuzz_files import Draft, base_of
import kqprefill
from kqprefill.backends.cuda.kv_cache import state_bytes, token_arrays
from kqprefill.backends.cuda.ops.latent import expanded_bytes
from kqprefill.core import Latent
from kqprefill.gguf.types import GGML
from kqprefill.models import describe_model, read_model
from kqprefill.synthetic import SyntheticFile

CASE = ROOT / "tests" / "data" / "deepseek2-moe-glm47-q3_k_m.gguf"


def draft():
    """A small model in float32: 4 heads, 32 elements of a key not rotated and 8 rotated, values of 16, a rank of 32."""
    base = base_of("deepseek2", GGML.F32)
    return Draft(base.metadata, base.tensors)


def written(path, model):
    path.write_bytes(model.encode()[0])
    return path


def logits_of(path):
    with kqprefill.load(path, backend="cpu") as model:
        return model.prefill(list(range(60)), logits="all").logits


def joined(model):
    """The same model as older converters wrote it: one matrix of keys and values, and no *_mla keys."""
    for part in ("key_length", "value_length"):
        model.metadata[f"deepseek2.attention.{part}"] = model.metadata.pop(f"deepseek2.attention.{part}_mla")
    by_name = {tensor[0]: tensor for tensor in model.tensors}
    for block in range(2):
        keys, values = (by_name[f"blk.{block}.attn_{part}_b.weight"] for part in "kv")
        k_b = np.frombuffer(keys[3], np.float32).reshape(4, 32, 32)
        v_b = np.frombuffer(values[3], np.float32).reshape(4, 16, 32)
        both = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
        keys[:4] = f"blk.{block}.attn_kv_b.weight", [32, 4 * 48], int(GGML.F32), bytearray(both.tobytes())
        model.tensors.remove(values)
    return model


def test_both_layouts_are_the_same_model(tmp_path):
    new, old = written(tmp_path / "new.gguf", draft()), written(tmp_path / "old.gguf", joined(draft()))
    assert np.array_equal(logits_of(new), logits_of(old))


def test_caches_keep_latent_rows():
    with kqprefill.load(CASE, backend="cpu") as model:
        assert model.family.layer_states == (Latent(64, 32),) * len(model.family.blocks)
        cache = model.new_cache(10)
        assert [[kept.shape for kept in state] for state in cache.rows.values()] == [[(10, 64), (10, 32)]] * 2


def test_what_latent_rows_take_on_cuda():
    state = Latent(40, 8)
    c, k_r = token_arrays(4096, state, 3)
    assert (c.shape, k_r.shape) == ((3, 64), (3, 8)) and (c.address, k_r.address) == (4096, 4096 + 3 * 128)
    assert state_bytes(state, 3) == 512  # 3 * (128 + 16), rounded up to where another layer's may begin
    lite, other = (read_model(SyntheticFile.named(f"{name}:Q4_K_M")) for name in ("deepseek-v2-lite", "tiny"))
    made = 4 * 16 * (128 + 128) + 2 * 512  # of a row: sums, and its copy
    assert expanded_bytes(lite, 1000) == 1000 * (2 * 16 * (192 + 128) + made) and expanded_bytes(other, 1000) == 0
    assert expanded_bytes(lite, 100_000) == 100_000 * 2 * 16 * (192 + 128) + 16384 * made


@pytest.mark.parametrize("multiplier,factor", [(None, 1.0), (None, 1.3), (0.0707, 1.0), (0.1, 1.3)])
def test_temperatures_of_yarn(multiplier, factor, tmp_path):
    model, growth = draft(), math.log(40)
    model.metadata |= {
        "deepseek2.rope.scaling.type": (8, "yarn"),
        "deepseek2.rope.scaling.factor": (6, 40.0),
        "deepseek2.rope.scaling.attn_factor": (6, factor),
    }
    if multiplier is not None:
        model.metadata["deepseek2.rope.scaling.yarn_log_multiplier"] = (6, multiplier)
    with kqprefill.load(written(tmp_path / "model.gguf", model), backend="cpu") as opened:
        family = opened.family
    assert family.rope.magnitude == pytest.approx(factor * (1 + (0.1 * growth if multiplier is None else 0)))
    grown = factor * (1 + (0.1 if multiplier is None else multiplier) * growth)
    assert family.attention_scale == pytest.approx(grown**2 / math.sqrt(40))


def test_glm_flash_chooses_by_sigmoids_though_its_first_files_do_not_say_so():
    metadata = dict(SyntheticFile.named("deepseek-v2-lite:Q4_K_M").metadata)
    del metadata["deepseek2.vocab_size"]
    assert not describe_model(metadata, "nowhere", 102400).experts.sigmoid
    assert describe_model({**metadata, "deepseek2.block_count": 47}, "nowhere", 154880).experts.sigmoid


@pytest.mark.parametrize(
    "changes,complaint",
    [
        ({"rope.dimension_count": (4, 40)}, "rope.dimension_count 40 leaves nothing of attention.key_length_mla 40"),
        ({"attention.value_length_mla": (4, 24)}, "attn_v_b.weight is [4, 16, 32], but the metadata asks for"),
        ({"attention.kv_lora_rank": None}, "attention.kv_lora_rank is missing"),
        ({"expert_shared_count": None}, "expert_shared_count is missing"),
        (
            {
                "rope.scaling.type": (8, "yarn"),
                "rope.scaling.factor": (6, 40.0),
                "rope.scaling.yarn_log_multiplier": (6, 1e37),
            },
            "the scale of attention's scores is not finite",
        ),
    ],
)
def test_metadata_that_contradict(changes, complaint, tmp_path):
    model = draft()
    for key, value in changes.items():
        model.metadata.pop(f"deepseek2.{key}", None)
        model.metadata |= {} if value is None else {f"deepseek2.{key}": value}
    with pytest.raises(kqprefill.ModelError) as refused:
        kqprefill.load(written(tmp_path / "model.gguf", model), backend="cpu")
    assert complaint in str(refused.value)


@pytest.mark.parametrize("architecture", ["deepseek2", "qwen35moe"])
def test_experts_that_are_neither_apart_nor_in_one_are_missed(architecture, tmp_path):
    base = base_of(architecture, GGML.F32)
    model = Draft(base.metadata, {name: t for name, t in base.tensors.items() if "1.ffn_up_exps" not in name})
    with pytest.raises(kqprefill.ModelError, match=r"blk\.1\.ffn_up_exps\.weight is missing"):
        kqprefill.load(written(tmp_path / "model.gguf", model), backend="cpu")
