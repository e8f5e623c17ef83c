"""Hopper's attention, by blocks that bring keys and values for one another: the bits of blocks that bring their own.
On emulated kernels, and (gpu) on a device."""

import numpy as np
import pytest

from emulator import EmulatedModel, why_not
import kqprefill
from kqprefill.backends.cuda.attention_kernels import HopperAttention
from kqprefill.core import Batch
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import Shape, SyntheticFile, write_gguf

emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")
# Heads of 64 and 128, two and four to one of k and v; and a window of keys.
SHAPES = {
    "two to one": Shape("llama", 1, 128, 4, 2, 64, 96, 131, 4096, 1e4),
    "four to one": Shape("qwen3", 1, 128, 4, 1, 128, 96, 131, 4096, 1e4),
    "window": Shape("gemma3", 2, 128, 4, 2, 64, 96, 131, 4096, 1e4, window=70),
}


@pytest.fixture
def sharers(monkeypatch):
    """Sets how many share; how many did, at each launch."""
    used = []

    def force(wanted):
        def count(config, nq, nkv, tiles, multiprocessors):
            assert nq // nkv % 2 == 0
            used.append(wanted)
            return wanted

        monkeypatch.setattr(HopperAttention, "sharers", count)
        used.clear()
        return used

    return force


def of_each(logits, sharers):
    """Logits with one, and with two."""
    found = []
    for wanted in (1, 2):
        used = sharers(wanted)
        found.append(logits())
        assert set(used) == {wanted}
    return found


@emulated
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [7, 300])
def test_emulated(name, n, sharers, rng, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(SyntheticFile(SHAPES[name], lambda *_: GGML.Q8_0, name), path)
    model = EmulatedModel(path, hopper=True)
    batch = Batch(rng.integers(0, 131, n).astype(np.int32))
    one, two = of_each(lambda: model.run(batch).logits, sharers)
    assert np.isfinite(one).all() and np.array_equal(one, two)
    model.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [7, 300, 2000])
def test_on_a_device(name, n, sharers, rng, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(SyntheticFile(SHAPES[name], lambda *_: GGML.Q8_0, name), path)

    tokens = rng.integers(0, 131, n)

    def logits():
        with kqprefill.load(path, backend="cuda") as model:
            return model.prefill(tokens, logits="all").logits

    one, two = of_each(logits, sharers)
    assert np.isfinite(one).all() and np.array_equal(one, two)
