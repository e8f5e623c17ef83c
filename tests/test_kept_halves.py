"""Matrices kept as halves beside their tiles: what room a plan has for them, and that results have the same bits with
all of them, some, or none."""

import json

from click.testing import CliRunner
import pytest

from host_backend import HostBackendGpu
from host_gpu import on_host
import kqprefill
from kqprefill.backends.cuda.bounds import H100
from kqprefill.backends.cuda.device.arrays import FLOAT32, DeviceArray
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.rehearsal import plan_model
from kqprefill.backends.cuda.weights.halves import KeptHalves
from kqprefill.backends.cuda.weights.matrix import Matrix
from kqprefill.backends.cuda.weights.share import Share
from kqprefill.cli.commands import cli
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile

GIB = 1 << 30
AS_HALVES = "weights as halves"
PORTABLE, KEEPS_NONE = (kernel_set_of(H100.capability, "portable") for _ in range(2))
KEEPS_NONE.keeps_halves = False


def plan_of(name, budget, tokens=2048, kernel_set=PORTABLE, **more):
    return plan_model(read_model(SyntheticFile.named(name)), H100, kernel_set, budget, tokens, **more)


# Plans ---------------------------------------------------------------------------------------------------------------


def test_all_are_kept_where_there_is_room():
    """Two bytes a weight of Qwen3-8B: 36 layers, whose sizes are multiples of 64, and the output matrix."""
    plan = plan_of("qwen3-8b:Q4_K_M", 80 * GIB)
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 12288
    assert plan.parts[AS_HALVES] == plan.halves_bytes == 2 * (36 * layer + 151936 * 4096)
    assert plan.nbytes == plan.least_bytes + plan.halves_bytes <= plan.budget


@pytest.mark.parametrize("gib", [6.5, 8, 15])
def test_they_take_what_is_left(gib):
    budget = int(gib * GIB)
    plan, others = plan_of("qwen3-8b:Q4_K_M", budget), plan_of("qwen3-8b:Q4_K_M", 80 * GIB)
    assert not plan.streamed and 0 < plan.halves_bytes < others.halves_bytes
    assert budget - 300 < plan.nbytes <= budget
    apart = (AS_HALVES, "allocator's slack")
    assert all(plan.parts[name] == others.parts[name] for name in others.parts if name not in apart)


@pytest.mark.parametrize(
    "gib,more",
    [(4, {}), (80, {"kernel_set": kernel_set_of(H100.capability)})],
    ids=["streamed", "Hopper"],
)
def test_none_are_kept(gib, more):
    plan = plan_of("qwen3-8b:Q4_K_M", gib * GIB, **more)
    assert bool(plan.streamed) == (gib == 4) and AS_HALVES not in plan.parts and plan.halves_bytes == 0


def test_in_int8_they_are_of_what_stays_exact():
    exact, int8 = plan_of("qwen3-8b:Q4_K_M", 80 * GIB), plan_of("qwen3-8b:Q4_K_M", 80 * GIB, precision="int8")
    layer, output = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288), 2 * 4096 * 151936
    assert exact.halves_bytes == 36 * layer + output and int8.halves_bytes == layer + output


def test_they_never_make_layers_leave(rng):
    """With and without, whatever the budget."""
    family = read_model(SyntheticFile.named("qwen3-0.6b:Q4_K_M"))
    for budget in rng.integers(int(1.15 * GIB), 3 * GIB, 12):
        with_, without = (plan_model(family, H100, kernels, int(budget), 2048) for kernels in (PORTABLE, KEEPS_NONE))
        assert with_.places_as(without) and with_.nbytes <= budget
        assert with_.least_bytes >= without.nbytes and without.halves_bytes == 0


def test_what_else_is_held_takes_their_room():
    plan = plan_of("qwen3-8b:Q4_K_M", 16 * GIB)
    for more in ({"cache_bytes": GIB}, {"sums_bytes": GIB}, {"tokens": 60000}):
        other = plan_of("qwen3-8b:Q4_K_M", 16 * GIB, **{"tokens": 2048, **more})
        assert not other.streamed and plan.halves_bytes - other.halves_bytes > 0.9 * GIB and other.places_as(plan)
    cached = plan.with_caches(GIB)
    assert cached.parts["caches"] == GIB and cached.halves_bytes + GIB == plan.halves_bytes + plan.budget - plan.nbytes
    assert cached.nbytes == plan.budget and cached.with_caches(GIB) == cached
    assert plan.with_caches(40 * GIB).nbytes > plan.budget and plan.with_caches(40 * GIB).halves_bytes == 0
    assert plan.with_halves(0).nbytes == plan.least_bytes and AS_HALVES not in plan.with_halves(0).parts


def test_each_share_has_its_own():
    whole = plan_of("qwen3-8b:Q4_K_M", 80 * GIB)
    parts = [plan_of("qwen3-8b:Q4_K_M", 80 * GIB, share=Share(layers, 36)) for layers in (range(20), range(20, 36))]
    assert sum(plan.halves_bytes for plan in parts) == whole.halves_bytes
    assert parts[0].halves_bytes == 20 * (whole.halves_bytes - 2 * 151936 * 4096) // 36


def test_the_command_says_it():
    asked = ["plan", "qwen3-8b:Q4_K_M", "--kernels", "portable", "--vram", "16G", "-p", "2048"]
    text = CliRunner().invoke(cli, asked).output
    parts = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)["parts"]
    assert f"  {AS_HALVES}" in text and 9 * GIB < parts[AS_HALVES] < 11 * GIB
    both = json.loads(CliRunner().invoke(cli, [*asked, "--device", "0,1", "--json"]).stdout)
    assert all(device["parts"][AS_HALVES] > 6 * GIB for device in both["devices"])


# What is kept --------------------------------------------------------------------------------------------------------


class Kept:
    """A KeptHalves, and which halves were made."""

    def __init__(self, room):
        self.gpu, self.made = HostBackendGpu(), []
        self.halves = KeptHalves(self.gpu, lambda matrix: matrix.name != "passing")
        self.halves.give_room(room)

    def of(self, name, scale=256, gated=False, rows=4, address=1 << 20):
        matrix = Matrix(name, GGML.Q8_0, address, rows, 64)

        def make(array):
            self.made.append(name)
            on_host(array)[:] = len(self.made)

        array = self.halves.of([matrix], gated, DeviceArray(scale, FLOAT32, (1,)), (rows, 64), make)
        return None if array is None else float(on_host(array)[0, 0])


def test_the_first_are_kept_as_long_as_there_is_room():
    kept = Kept(1100)  # 512 bytes each
    assert [kept.of(name) for name in "abcab"] == [1.0, 2.0, None, 1.0, 2.0] and kept.made == ["a", "b"]
    assert kept.halves.nbytes == kept.gpu.held == 1024
    kept.halves.give_room(1100)
    assert kept.of("b") == 2.0  # nothing was given back for no reason
    kept.halves.give_room(600)
    assert kept.halves.nbytes == kept.gpu.held == 512
    assert [kept.of(name) for name in "ab"] == [1.0, None]
    kept.halves.give_room(2000)
    assert [kept.of(name) for name in "abc"] == [1.0, 3.0, 4.0]
    kept.halves.give_room(0)
    assert kept.gpu.held == 0 and kept.of("a") is None
    kept.halves.give_room(600)
    kept.of("a")
    kept.halves.close()
    assert kept.gpu.held == 0


def test_each_form_is_another():
    """The same matrix times another scale, by turns, of other rows, at another place."""
    kept = Kept(1 << 20)
    forms = [{}, {"scale": 512}, {"gated": True}, {"rows": 8}, {"address": 1 << 21}]
    assert [kept.of("a", **form) for form in forms + forms] == [1.0, 2.0, 3.0, 4.0, 5.0] * 2


def test_matrices_that_do_not_stay_are_not_kept():
    kept = Kept(1 << 20)
    assert kept.of("passing") is None and not kept.made and kept.gpu.held == 0


def test_nothing_is_kept_while_a_graph_is_captured():
    kept = Kept(1 << 20)
    assert kept.of("a") == 1.0
    kept.gpu.capturing = True
    assert kept.of("a") == 1.0 and kept.of("b") is None
    kept.gpu.capturing = False
    assert kept.of("b") == 2.0


def test_memory_that_others_took_is_done_without():
    kept = Kept(1 << 20)
    assert kept.of("a") == 1.0
    kept.gpu.limit = 600
    assert kept.of("b") is None and kept.gpu.held == 0  # what is held is given back, too
    kept.gpu.limit = 1 << 20
    assert kept.of("b") is None  # it is not asked for again and again
    kept.halves.give_room(1 << 20)
    assert kept.of("b") == 2.0


def test_what_could_not_be_made_is_not_kept():
    kept = Kept(1 << 20)
    matrix = Matrix("a", GGML.Q8_0, 1 << 20, 4, 64)

    def fail(array):
        raise kqprefill.BackendError("as if")

    with pytest.raises(kqprefill.BackendError, match="as if"):
        kept.halves.of([matrix], False, DeviceArray(256, FLOAT32, (1,)), (4, 64), fail)
    assert kept.gpu.held == kept.halves.nbytes == 0 and kept.of("a") == 1.0


def test_graphs_hear_of_what_was_given_back():
    kept = Kept(2000)
    before = kept.halves.generation
    kept.of("a")
    kept.halves.give_room(2000)
    assert kept.halves.generation == before
    kept.halves.give_room(100)
    assert kept.halves.generation > before
