"""Files with faults through the commands: a share of what tests/bench/fuzz.py runs."""

import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, share_of
from fuzz_files import SMALL_TYPES, Draft, base_of, vocabulary
from kqprefill.models import FAMILIES


@pytest.mark.parametrize("count", [100, pytest.param(share_of(1000), marks=pytest.mark.slow)])
def test_no_file_surprises(count, rng, tmp_path):
    """In a process of its own, from which each command is forked."""
    args = [sys.executable, ROOT / "tests/bench/fuzz.py", str(count), str(rng.integers(1 << 62))]
    done = subprocess.run(args, capture_output=True, text=True, env={"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_damaged_was_sound(architecture, tmp_path):
    """Of every family: otherwise the fuzzing would not come past the first check."""
    from random import Random

    import kqprefill

    for number, kind in enumerate(SMALL_TYPES):
        base = base_of(architecture, kind)
        random = Random(number)
        raw, _ = Draft({**base.metadata, **vocabulary(random, 288)}, base.tensors).encode()
        path = tmp_path / f"{kind.name}.gguf"
        path.write_bytes(raw)
        with kqprefill.load(path, backend="cpu") as model:
            ids = model.tokenize("Hello a")
            if model.family.both_ways:
                assert np.isfinite(next(model.embed([ids], "mean"))).all()
            else:
                assert model.prefill(ids, logits="all").logits.shape[1] == 288
