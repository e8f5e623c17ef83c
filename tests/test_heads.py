"""Heads of q, k and v that Hopper's GEMMs make of their sums: the same bits as of sums that went through memory."""

from dataclasses import replace

from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from emulator import EmulatedModel, why_not
import kqprefill
from kqprefill.backends.cuda.gemm import hopper, int8_hopper
from kqprefill.backends.cuda.gemm.heads import HeadsKind
from kqprefill.core import Batch, Segment
from kqprefill.synthetic import SyntheticFile, write_gguf
from op_models import shape

emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
MODELS = {
    "normed, heads of 128": (shape("qwen3", 128, 3, 1, 128, 128, 65), GGML.Q8_0),
    "normed, heads of 64": (shape("qwen3", 128, 3, 3, 64, 128, 65), GGML.Q8_0),
    "biases, heads of 64": (shape("qwen2", 128, 4, 2, 64, 128, 65), GGML.Q5_0),
    "biases, heads of 128": (shape("qwen2", 128, 2, 1, 128, 128, 65), GGML.Q5_0),
    "neighbours, heads of 64": (shape("llama", 128, 3, 1, 64, 128, 65), GGML.Q4_0),
    "neighbours, heads of 128": (shape("llama", 256, 2, 2, 128, 128, 65), GGML.Q4_K),
    "neighbours, and a layer that is not rotated": (shape("smollm3", 128, 2, 1, 64, 128, 65, layers=4), GGML.Q8_0),
}
# Precision, tokens and warpgroups of a tile: of three, two blocks have whole heads of 128 together.
TILES = [
    ("exact", 128, 2),
    ("exact", 128, 3),
    ("exact", 256, 2),
    ("int8", 64, 2),
    ("int8", 128, 2),
    ("int8", 256, 2),
]
NOT_ROTATED = {("neighbours, and a layer that is not rotated", "int8", 64, 2)}
QUICK = {("normed, heads of 128", "exact", 128, 3), ("neighbours, heads of 64", "int8", 64, 2)}


def packed(rng):
    """Sequences side by side, two of which begin alike: rows of keys are not those of the tokens."""
    segments = (Segment(0, 20), Segment(20, 31, 20, after=0), Segment(51, 29))
    return Batch(rng.integers(0, 65, 80).astype(np.int32), segments=segments)


EVERY = [(name, *tiles) for name in MODELS for tiles in TILES]  # on a GPU
EMULATED = sorted({(name, *TILES[i % len(TILES)]) for i, name in enumerate(MODELS)} | QUICK | NOT_ROTATED)


class Chosen:
    """Multiplies by the configurations whose blocks have whole heads; and, where told so, lets them make heads."""

    def __init__(self, layers, precision, tokens, warpgroups, monkeypatch):
        self.made, self._clustered, self._patch = [], HeadsKind.clustered, monkeypatch
        own, first = (tokens, warpgroups), (128, 2)
        # Of a layer each; in int8 the first is exact.
        self.expected = [own] * layers if precision == "exact" else [first, *[own] * (layers - 1)]
        self._multiply_by(hopper, hopper.HEADS_CONFIGS, self.expected[0])
        self._multiply_by(int8_hopper, int8_hopper.CONFIGS, own)

    def _multiply_by(self, module, configs, tile):
        config = next(c for c in configs if (c.gated, c.tokens, c.warpgroups, c.tiles) == (0, *tile, 2))
        best = module.best_config
        self._patch.setattr(
            module,
            "best_config",
            lambda m, row_tiles, gated, *rest: best(m, row_tiles, True, *rest) if gated else config,
        )
        if module is hopper:
            self._patch.setattr(module, "heads_config", lambda m, row_tiles, types, kind, *_: kind.clustered(config))

    def make_heads(self, allowed):
        def clustered(kind, config):
            if allowed:
                self.made.append((config.tokens, config.warpgroups))
            return self._clustered(kind, config) if allowed else None

        self._patch.setattr(HeadsKind, "clustered", clustered)


def written(name, precision, folder):
    """Such a model's layers, and its path."""
    description, kind = MODELS[name]
    layers = max(description.layers, 1 if precision == "exact" else 2)
    file = SyntheticFile(replace(description, layers=layers), lambda *_: kind, name)
    write_gguf(file, folder / "model.gguf")
    return layers, folder / "model.gguf"


@emulated
@pytest.mark.parametrize(
    "name,precision,tokens,warpgroups",
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in EMULATED],
)
def test_the_same_bits(name, precision, tokens, warpgroups, rng, tmp_path, monkeypatch):
    layers, path = written(name, precision, tmp_path)
    model = EmulatedModel(path, hopper=True, precision=precision)
    chosen = Chosen(layers, precision, tokens, warpgroups, monkeypatch)
    batches, logits = [packed(rng), Batch(rng.integers(0, 65, 300).astype(np.int32))], []
    for allowed in (False, True):
        chosen.make_heads(allowed)
        logits.append([model.run(batch).logits for batch in batches])
    assert chosen.made == len(batches) * chosen.expected
    assert all(np.isfinite(e).all() and np.array_equal(e, g) for e, g in zip(*logits))
    model.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name,precision,tokens,warpgroups", EVERY)
def test_the_same_bits_on_a_gpu(name, precision, tokens, warpgroups, rng, tmp_path, monkeypatch):
    layers, path = written(name, precision, tmp_path)
    chosen, logits = Chosen(layers, precision, tokens, warpgroups, monkeypatch), []
    prompt = rng.integers(0, 65, 300).tolist()
    records = [{"tokens": prompt[:20], "choices": [prompt[20:70], prompt[100:131]]}, prompt[:90]]
    for allowed in (False, True):
        chosen.make_heads(allowed)
        with kqprefill.load(path, backend="cuda", precision=precision) as model:
            if model.backend.kernel_set.name != "Hopper":
                pytest.skip("heads that Hopper's GEMMs make")
            first, last = model.score(records)
            scored = [*(choice.logprobs for choice in first), last.logprobs]
            logits.append([model.prefill(prompt, logits="all").logits, *scored])
    assert set(chosen.made) == set(chosen.expected)
    assert all(np.isfinite(e).all() and np.array_equal(e, g) for e, g in zip(*logits))
