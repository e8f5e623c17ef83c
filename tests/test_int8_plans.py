"""What plans and bounds say of models in int8 on CUDA."""

import numpy as np
import pytest

from kqprefill.backends.cuda.bounds import Speed, floors
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.rehearsal import plan_model
from kqprefill.backends.cuda.weights.matrix import tile_bytes
from kqprefill.models import read_model
from kqprefill.models.precision import takes_int8
from kqprefill.synthetic import SyntheticFile
from launches import Facts


@pytest.mark.parametrize("model", ["qwen3-8b:Q4_K_M", "qwen3-30b-a3b:Q4_K_M"])
def test_plans_count_what_int8_takes(model):
    """A byte for each weight of the layers' large matrices, and 4 for each of their rows; all else as before."""
    family, kernel_set = read_model(SyntheticFile.named(model)), kernel_set_of((9, 0))
    exact, int8 = (
        plan_model(family, Facts((9, 0)), kernel_set, 80 << 30, 512, precision=precision)
        for precision in ("exact", "int8")
    )
    large = [w for block in family.blocks for w in block if w.is_matrix and takes_int8(w)]
    weights = sum(int(np.prod(w.shape)) for w in large)
    kept = int8.parts["layers that stay, in int8"]
    others = tile_bytes(w.tensor for block in family.blocks for w in block if w.is_matrix and not takes_int8(w))
    assert weights + others < kept < 1.01 * weights + others
    assert all(int8.parts[name] == exact.parts[name] for name in ("CUDA context", "output", "embedding"))


def test_streamed_layers_have_room_to_be_made_in():
    """A budget that not all layers fit has some streamed, in the file's format, and made int8 when they have come."""
    family, kernel_set = read_model(SyntheticFile.named("qwen3-8b:Q4_K_M")), kernel_set_of((9, 0))
    exact, int8 = (
        plan_model(family, Facts((9, 0)), kernel_set, 5 << 30, 512, precision=precision)
        for precision in ("exact", "int8")
    )
    assert int8.streamed and len(int8.streamed) > len(exact.streamed) and int8.nbytes <= 5 << 30
    raw = sum(t.nbytes for layer in int8.streamed for t in (w.tensor for w in family.blocks[layer] if w.is_matrix))
    assert raw <= int8.streamed_bytes < 1.001 * raw


def test_bounds_are_those_of_int8():
    """Half the time for Qwen3-8B's matrices, more to read them, and as long as before for attention."""
    family, kernel_set, facts = read_model(SyntheticFile.named("qwen3-8b:Q4_K_M")), kernel_set_of((9, 0)), Facts((9, 0))
    exact, int8 = (
        [seconds(2048) for _, seconds in floors(plan_model(family, facts, kernel_set, 80 << 30, 2048), *given)]
        for given in ((family, facts), (family, facts, "int8"))
    )
    assert 0.5 < int8[0] / exact[0] < 0.6 and 1.2 < int8[1] / exact[1] < 2
    speeds = (Speed(family, facts, kernel_set, precision) for precision in ("exact", "int8"))
    plan = plan_model(family, facts, kernel_set, 80 << 30, 2048)
    assert next(speeds).seconds(plan, 2048).resident > 1.4 * next(speeds).seconds(plan, 2048).resident
