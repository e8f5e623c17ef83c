"""Small models of many shapes, by whose layers the kernels are held to the reference on the host (emulator.py)."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import kl_divergence, relative_error
from emulator import EmulatedModel, why_not
import kqprefill
from kqprefill.core import Batch
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile, write_gguf
from small_models import more_metadata

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}"),
]
LENGTHS = (1, 7, 63, 65, 129)  # before and behind where chunks and tiles end


def mamba(heads, head_dim, groups, state, kernel=4):
    return {
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": heads * head_dim,
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


def nemotron(*sizes, **more):
    kinds = {"attention.head_count_kv": [0, 2, 0, 0], "feed_forward_length": [0, 0, 200, 0]}
    return Shape("nemotron_h", 4, 160, 4, 2, 48, 200, 131, 4096, 1e4, more={**kinds, **mamba(*sizes), **more})


def lfm2(taps, hidden=160):
    more = {"attention.head_count_kv": [0, 1, 0], "shortconv.l_cache": taps}
    return Shape("lfm2", 3, hidden, 4, 1, hidden // 4, 200, 131, 4096, 1e6, tied=True, more=more)


def of(architecture, **sizes):
    """A model of the sizes that all small ones have, but for some."""
    base = Shape(architecture, 4, 160, 4, 2, 40, 200, 131, 4096, 1e4, window=40, more=more_metadata(architecture))
    return replace(base, **sizes)


def kimi(head_dim):
    more = more_metadata("kimi-linear") | {"kda.head_dim": head_dim, "attention.kv_lora_rank": 96}
    return Shape("kimi-linear", 4, 160, 4, 4, 40, 64, 131, 4096, 1e4, experts=4, used=2, more=more)


MODELS = {
    "Mamba-2, heads of 80, groups of two": nemotron(4, 80, 2, 128),
    "Mamba-2, heads of 16 and 16 rows": nemotron(6, 16, 3, 16),
    "Mamba-2, heads of 128 and 256 rows": nemotron(2, 128, 1, 256),
    "Mamba-2, two taps, no multiple of 32": nemotron(5, 24, 5, 48, 2),
    "Mamba-2 beside attention": of("falcon-h1", more=mamba(6, 40, 2, 32)),
    "convolutions of two taps": lfm2(2),
    "convolutions of four taps, narrow": lfm2(4, 96),
    "LayerNorm, side by side": of("command-r"),
    "LayerNorm of heads": replace(of("command-r"), layers=64, hidden=96, head_dim=24, ffn=96),
    "LayerNorm, windows": of("cohere2"),
    "LayerNorm with biases, no gates": of("starcoder2"),
    "norms with biases, experts": of("phimoe", experts=5, used=2),
    "norms after rotation": of("hunyuan-dense"),
    "experts that get shares": replace(of("llama4", experts=6, used=2), window=0),
    "experts without gates on fewer values": Shape(
        *("nemotron_h_moe", 4, 160, 4, 2, 48, 96, 131, 4096, 1e4),
        experts=6,
        used=3,
        more={
            "attention.head_count_kv": [0, 2, 0, 0],
            "feed_forward_length": [0, 0, 96, 0],
            **mamba(4, 32, 2, 32),
            "moe_latent_size": 64,
            "expert_shared_feed_forward_length": 72,
            "expert_weights_norm": True,
        },
    ),
    "Kimi Delta Attention, heads of 64": kimi(64),
    "Kimi Delta Attention, heads of 128": kimi(128),
    "streams": of("gemma3n", layers=7, head_dim=48),
}


def type_of(name, layer):
    """Formats of all kinds of units; routers and the like in floats."""
    return GGML.F32 if name == "ffn_gate_inp" else (GGML.Q8_0, GGML.Q5_0, GGML.F16)[sum(name.encode()) % 3]


@pytest.mark.parametrize("case", MODELS)
def test_as_the_reference(case, rng, tmp_path):
    write_gguf(SyntheticFile(MODELS[case], type_of, case), tmp_path / "model.gguf")
    model = EmulatedModel(tmp_path / "model.gguf", shared_memory=227 << 10 if "256 rows" in case else 99 << 10)
    with kqprefill.load(tmp_path / "model.gguf", backend="cpu") as cpu:
        for length in LENGTHS:
            tokens = rng.integers(0, 131, length).astype(np.int32)
            expected = cpu.prefill(tokens, logits="all").logits
            divergence = kl_divergence(expected, model.run(Batch(tokens)).logits)
            assert divergence <= (1e-4 if model.family.experts is not None else 1e-5), f"{length}: {divergence:.1e}"
    model.close()


@pytest.mark.parametrize("case", ["LayerNorm with biases, no gates", "Mamba-2, heads of 16 and 16 rows"])
def test_networks_without_a_gate_on_both_kernel_sets(case, rng, tmp_path):
    """Their products make the activated operand, whose last group 200 columns do not fill."""
    write_gguf(SyntheticFile(MODELS[case], type_of, case), tmp_path / "model.gguf")
    tokens, logits = rng.integers(0, 131, 70).astype(np.int32), []
    for hopper in (False, True):
        model = EmulatedModel(tmp_path / "model.gguf", hopper=hopper)
        logits.append(model.run(Batch(tokens)).logits)
        model.close()
    with kqprefill.load(tmp_path / "model.gguf", backend="cpu") as cpu:
        assert kl_divergence(cpu.prefill(tokens, logits="all").logits, logits[1]) <= 1e-5
    assert relative_error(*logits) < 1e-3
