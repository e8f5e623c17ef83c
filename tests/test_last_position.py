"""Where nothing is asked of a prompt but its last position, the last layer's attention and all after it compute that
one alone: the bits of prompts of which all is asked. On emulated kernels, and (gpu) on a device."""

import numpy as np
import pytest

from conftest import CASES, CONFORMANCE_FOLDERS
from emulator import why_not
from host_backend import run_on_host
from kqprefill.backends.cuda import rehearsal
from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.backends.cuda.bounds import H100
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.ops.batch import received
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.backends.cuda.rehearsal import planned_batch, rehearse
from kqprefill.core import Batch, KeysValues, Latent
from kqprefill.engine.model import open_model
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile

RELEASED = sorted(path.stem for path in CONFORMANCE_FOLDERS[0].glob("*.gguf"))
FAMILIES = [case for case in RELEASED if not case.startswith("qwen3-") or case == "qwen3-q4_k"]  # of formats, one
# Attention and a network one after the other, and side by side; norms after them; experts.
QUICK = "qwen3-q4_k command-r-q3_k gemma3-q4_k_m ernie4_5-moe-q3_k".split()
WHOLE = {"gemma3n-tiny", "gemma4-q4_k_m", "falcon-h1-q2_k"}  # whose pages say that all rows are needed
emulated = pytest.mark.skipif(why_not() is not None, reason=f"kernels are not emulated: {why_not()}")


@pytest.fixture
def rows(monkeypatch):
    """How many rows of the residual stream came out of the last layer, of each prompt that was launched."""
    seen, advance = [], CudaBackend.advance

    def counted(backend, *args, **kwargs):
        result = advance(backend, *args, **kwargs)
        seen.append(result[0].array.shape[0])
        return result

    monkeypatch.setattr(CudaBackend, "advance", counted)
    return seen


def check_same_bits(case, precision, lengths, rng, rows):
    """A prompt by itself, and behind another in a cache."""
    with open_model(GGUFFile(CASES[case]), "cuda", precision=precision) as model:
        for length in lengths:
            tokens = rng.integers(0, model.config.vocab_size, length)
            every = model.prefill(tokens, logits="all")
            last = model.prefill(tokens, logits="last")
            assert np.isfinite(last.logits).all() and np.array_equal(last.logits, every.logits[-1])
            assert (last.token, last.logit, last.logprob) == (every.token, every.logit, every.logprob)
        cache, state = model.new_cache(length), model.family.layer_states[-1]
        model.prefill(tokens[:50], cache=cache)
        assert np.array_equal(model.prefill(tokens[50:], logits="last", cache=cache).logits, every.logits[-1])
    alone = isinstance(state, (KeysValues, Latent)) and case not in WHOLE
    assert (rows[-1] == 1) == alone


@emulated
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in FAMILIES])
def test_emulated(case, monkeypatch, rng, rows):
    run_on_host(monkeypatch)
    check_same_bits(case, "exact", (7, 70), rng, rows)


@emulated
def test_what_another_device_sends_is_whole(monkeypatch):
    """Also to ops that have been through the last layer, as those of a graph have."""
    run_on_host(monkeypatch)
    with open_model(GGUFFile(CASES["qwen3-q4_k"]), "cuda") as model:
        ops = CudaOps(model.backend.context, model.family, Batch(np.arange(9, dtype=np.int32)), None, last_alone=True)
        model.family.forward(ops)
        assert ops.n == 1 and received(ops, model.family).shape[0] == 9


def test_plans_have_room_for_all_positions(monkeypatch):
    """A model's only layer may be asked for all of them, too."""
    family = read_model(SyntheticFile(Shape("llama", 1, 64, 2, 2, 32, 96, 131, 4096, 1e4), lambda *_: GGML.Q8_0, "one"))
    planned, alone = (
        rehearse(family, H100, kernel_set_of((9, 0)), planned_batch(500, False), last_alone=alone)
        for alone in (False, True)
    )
    assert planned.work_bytes > alone.work_bytes and planned.matrix_flops > alone.matrix_flops
    seen, make_plan = [], rehearsal.make_plan
    monkeypatch.setattr(rehearsal, "make_plan", lambda *args: (seen.append(args[3](False)), make_plan(*args))[1])
    rehearsal.plan_model(family, H100, kernel_set_of((9, 0)), 1 << 30, 500)
    assert [needs.work_bytes for needs in seen] == [planned.work_bytes]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("case", RELEASED)
def test_on_a_device(case, precision, rng, rows):
    check_same_bits(case, precision, (1, 7, 65, 129), rng, rows)
