"""Families without a backend: which layers run, in which order, and that each does what it declares."""

from __future__ import annotations

from typing import Any

import pytest

from kqprefill.core import KeysValues, Recurrent
from kqprefill.gguf.types import GGML
from kqprefill.models import FAMILIES, read_model
from kqprefill.synthetic import Shape, SyntheticFile
from small_models import more_metadata


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

    def gated_qkv(self, *_: Any, **__: Any) -> tuple[None, None, None, None]:
        return None, None, None, None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


WINDOWS = {
    "gemma2": [40, None, 40, None, 40, None, 40],
    "gpt-oss": [40, None, 40, None, 40, None, 40],
    "gemma4": [40, 40, None, 40, None, 40, None],
    "gemma3": [40, 40, 40, 40, 40, None, 40],
    "olmo2": [40, 40, 40, None, 40, 40, 40],
    "phi3": [40] * 7,
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_layers_run_in_order_with_the_windows_that_they_declare(architecture: str) -> None:
    more = more_metadata(architecture)
    shape = Shape(architecture, 7, 64, 4, 2, 16, 64, 256, 4096, 1e4, window=40, experts=4, used=2, more=more)
    family = read_model(SyntheticFile(shape, lambda *_: GGML.F32, architecture))
    ops: Any = Recorder()
    heard: list[tuple[str, int, int]] = []
    family.forward(ops, lambda *progress: heard.append(progress))
    assert ops.layers == list(range(7)) and heard == [("prefill", i + 1, 7) for i in range(7)]
    kept = [state for state in family.layer_states if isinstance(state, KeysValues)]
    assert ops.windows == [state.window for state in kept] == WINDOWS.get(architecture, [None] * len(kept))
    assert {(state.heads, state.head_dim) for state in kept} <= {(2, 16)}
    assert bool(kept) == (architecture != "deepseek2")  # all of whose layers keep latent rows
    recurrent = [i for i, state in enumerate(family.layer_states) if isinstance(state, Recurrent)]
    assert recurrent == ([0, 1, 2, 4, 5, 6] if architecture.startswith(("qwen35", "qwen3next")) else [])
