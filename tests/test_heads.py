"""Heads of q, k and v that Hopper's GEMMs make of their sums: the same bits as of sums that went through memory."""

from dataclasses import replace

from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from emulator import EmulatedModel, why_not
from kqprefill.backends.cuda.gemm import hopper, int8_hopper
from kqprefill.backends.cuda.gemm.heads import HeadsKind
from kqprefill.core import Batch, Segment
from kqprefill.synthetic import SyntheticFile, write_gguf
from op_models import shape

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
MODELS = {
    "normed, heads of 128": (shape("qwen3", 128, 3, 1, 128, 128, 65), GGML.Q8_0),
    "normed, heads of 64": (shape("qwen3", 128, 3, 3, 64, 128, 65), GGML.Q8_0),
    "biases, heads of 64": (shape("qwen2", 128, 4, 2, 64, 128, 65), GGML.Q5_0),
    "biases, heads of 128": (shape("qwen2", 128, 2, 1, 128, 128, 65), GGML.Q5_0),
    "neighbours, heads of 64": (shape("llama", 128, 3, 1, 64, 128, 65), GGML.Q4_0),
    "neighbours, heads of 128": (shape("llama", 256, 2, 2, 128, 128, 65), GGML.Q4_K),
}
TILES = [("exact", 128), ("exact", 256), ("int8", 64), ("int8", 128), ("int8", 256)]
QUICK = {("normed, heads of 128", "exact", 128), ("neighbours, heads of 64", "int8", 64)}


def packed(rng):
    """Sequences side by side, two of which begin alike: rows of keys are not those of the tokens."""
    segments = (Segment(0, 20), Segment(20, 31, 20, after=0), Segment(51, 29))
    return Batch(rng.integers(0, 65, 80).astype(np.int32), segments=segments)


@pytest.mark.parametrize(
    "name,precision,tokens",
    [
        pytest.param(name, *tiles, marks=() if (name, *tiles) in QUICK else pytest.mark.slow)
        for name in MODELS
        for tiles in TILES
    ],
)
def test_the_same_bits(name, precision, tokens, rng, tmp_path, monkeypatch):
    description, kind = MODELS[name]
    file = SyntheticFile(replace(description, layers=1 if precision == "exact" else 2), lambda *_: kind, name)
    write_gguf(file, tmp_path / "model.gguf")
    model = EmulatedModel(tmp_path / "model.gguf", hopper=True, precision=precision)
    fits, made = HeadsKind.fits, []

    def of_tokens(module, tokens):
        """Multiply by the configuration whose blocks have whole heads of so many tokens."""
        config = next(c for c in module.CONFIGS if (c.gated, c.tokens, c.warpgroups, c.tiles) == (0, tokens, 2, 2))
        best = module.best_config
        monkeypatch.setattr(
            module,
            "best_config",
            lambda m, row_tiles, gated, *rest: best(m, row_tiles, True, *rest) if gated else config,
        )

    def fitting(kind, config):
        made.append(config.tokens)
        return fits(kind, config)

    of_tokens(hopper, tokens if precision == "exact" else 128)
    of_tokens(int8_hopper, tokens)
    batches, logits = [packed(rng), Batch(rng.integers(0, 65, 300).astype(np.int32))], []
    for allowed in (lambda *_: False, fitting):
        monkeypatch.setattr(HeadsKind, "fits", allowed)
        logits.append([model.run(batch).logits for batch in batches])
    assert made == len(batches) * ([tokens] if precision == "exact" else [128, tokens])  # in int8 the first is exact
    assert all(np.isfinite(e).all() and np.array_equal(e, g) for e, g in zip(*logits))
    model.close()
