"""Families without a backend: which layers run, in which order, and that each does what it declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kqprefill
from kqprefill.core import KeysValues, Recurrent, SharedKeysValues
from kqprefill.gguf.types import GGML
from kqprefill.models import FAMILIES, read_model
from kqprefill.synthetic import Shape, SyntheticFile, write_gguf
from small_models import EXPERTS, more_metadata


class Recorder:
    """In place of a backend's Ops: notes the layers that begin, and the window of each layer's attention."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.windows: list[int | None] = []

    def begin_layer(self, index: int) -> None:
        self.layers.append(index)

    def attention(self, q: Any, k: Any, v: Any, *, window: int | None = None, **_: Any) -> None:
        self.windows.append(window)

    def qkv(self, *_: Any, **__: Any) -> tuple[None, None, None]:
        return None, None, None

    def altup_predict(self, *_: Any) -> tuple[None, None]:
        return None, None

    def gated_qkv(self, *_: Any, **__: Any) -> tuple[None, None, None, None]:
        return None, None, None, None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


WINDOWS = {
    "gemma2": [40, None, 40, None, 40, None, 40],
    "gpt-oss": [40, None, 40, None, 40, None, 40],
    "gemma4": [40, 40, None, 40, None, 40, None],
    "gemma3n": [40, 40, None, 40, 40, None, 40],
    "gemma3": [40, 40, 40, 40, 40, None, 40],
    "gemma-embedding": [21, 21, 21, 21, 21, None, 21],
    "olmo2": [40, 40, 40, None, 40, 40, 40],
    "phi3": [40] * 7,
    "llama4": [8192, 8192, 8192, None, 8192, 8192, 8192],
    "cohere2": [40, 40, 40, None, 40, 40, 40],
}
RECURRENT = {
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), (0, 1, 2, 4, 5, 6)),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), (0, 3, 6)),  # others are feed-forward networks
    **dict.fromkeys(("lfm2", "lfm2moe", "granitehybrid", "kimi-linear"), (0, 2, 3, 4, 6)),
    "falcon-h1": tuple(range(7)),
}
LATENT = ("deepseek2", "mistral4", "kimi-linear")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_layers_run_in_order_with_the_windows_that_they_declare(architecture: str) -> None:
    more = more_metadata(architecture)
    shape = Shape(architecture, 7, 64, 4, 2, 16, 64, 256, 4096, 1e4, window=40, experts=4, used=2, more=more)
    family = read_model(SyntheticFile(shape, lambda *_: GGML.F32, architecture))
    ops: Any = Recorder()
    heard: list[tuple[str, int, int]] = []
    family.forward(ops, lambda *progress: heard.append(progress))
    assert ops.layers == list(range(7)) and heard == [("prefill", i + 1, 7) for i in range(7)]
    parts = [(i, part) for i, state in enumerate(family.layer_states) for part in state.parts]
    kept = [part for _, part in parts if isinstance(part, KeysValues)]
    assert ops.windows == [state.window for state in kept] == WINDOWS.get(architecture, [None] * len(kept))
    assert {(state.heads, state.head_dim) for state in kept} <= {(2, 16)}
    assert bool(kept) == (architecture not in LATENT)  # whose layers keep latent rows
    assert tuple(i for i, part in parts if isinstance(part, Recurrent)) == RECURRENT.get(architecture, ())


def fused(file: SyntheticFile) -> SyntheticFile:
    """The same model, with q, k and v of each layer (and their biases) in one tensor, where it has all three."""
    tensors: dict[str, Any] = dict(file.tensors)
    for index in range(file.block_count):
        for end in ("weight", "bias"):
            names = [f"blk.{index}.attn_{part}.{end}" for part in "qkv"]
            if all(name in tensors for name in names):
                q, k, v = (tensors.pop(name) for name in names)
                data = np.concatenate([q.data, k.data, v.data])
                name = f"blk.{index}.attn_qkv.{end}"
                tensors[name] = SimpleNamespace(name=name, type=q.type, data=data, nbytes=data.nbytes)
    file.tensors = tensors
    return file


def test_k_and_v_that_a_layer_has_in_one_tensor_with_q_and_does_not_use(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Gemma 4's layers that share those of another."""
    more = {**more_metadata("gemma4"), "attention.shared_kv_layers": 2}
    values = r"blk\.\d+\.attn_v\.weight"  # Gemma 4's may lack them
    shape = Shape("gemma4", 6, 256, 4, 2, 64, 256, 256, 4096, 1e4, window=40, more=more, optional=values)
    tokens, logits = rng.integers(0, 256, 40), []
    for change in (lambda file: file, fused):
        file = change(SyntheticFile(shape, lambda *_: GGML.Q4_0, "gemma4"))
        for index in (4, 5) if change is fused else ():
            q = file.tensors.pop(f"blk.{index}.attn_q.weight")
            name, data = f"blk.{index}.attn_qkv.weight", np.concatenate([q.data, q.data[::-1]])  # heads: 4, 2 and 2
            file.tensors[name] = SimpleNamespace(name=name, type=q.type, data=data, nbytes=data.nbytes)
        write_gguf(file, tmp_path / "model.gguf")
        with kqprefill.load(tmp_path / "model.gguf", backend="cpu") as model:
            assert [type(state) for state in model.family.layer_states].count(SharedKeysValues) == 2
            logits.append(model.prefill(tokens, logits="all").logits)
    assert np.array_equal(*logits)


FUSED = [name for name in FAMILIES if name not in ("phi3", *LATENT)]  # phi3's files have no other


@pytest.mark.parametrize("architecture", FUSED)
def test_q_k_and_v_in_one_tensor(architecture: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """As llama.cpp's converter writes them with --fuse-qkv: the same bits."""
    values = r"blk\.\d+\.attn_v\.weight"  # Gemma 4's may lack them
    more = more_metadata(architecture)
    shape = Shape(architecture, 4, 256, 4, 2, 64, 256, 256, 4096, 1e4, window=40, more=more, optional=values)
    shape = replace(shape, experts=4, used=2) if architecture in EXPERTS else shape
    tokens, logits = rng.integers(0, 256, 40), []
    for change in (lambda file: file, fused):
        file = change(SyntheticFile(shape, lambda *_: GGML.Q4_0, architecture))
        write_gguf(file, tmp_path / "model.gguf")
        with kqprefill.load(tmp_path / "model.gguf", backend="cpu") as model:
            if model.family.both_ways:
                logits.append(next(model.embed([tokens], "mean")))
            else:
                logits.append(model.prefill(tokens, logits="all").logits)
    assert any("attn_qkv.weight" in name for name in file.tensors) and np.array_equal(*logits)


def test_q_beside_q_k_and_v_is_refused() -> None:
    file = SyntheticFile.named("tiny")
    q = file.tensors["blk.0.attn_q.weight"]
    with pytest.raises(kqprefill.ModelError, match=r"tensor blk\.0\.attn_q\.weight \(and 2 more\) has no place"):
        file.tensors["blk.0.attn_qkv.weight"] = replace(q, name="blk.0.attn_qkv.weight", shape=(512, 256))
        read_model(file)
