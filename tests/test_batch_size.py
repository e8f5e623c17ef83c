"""How large batches are where layers are streamed: what hides copies, who chooses it, and that no result changes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT
import kqprefill
from kqprefill.backends.base import BatchSize
from kqprefill.backends.cuda import backend as cuda_backend
from kqprefill.backends.cuda.backend import CudaBackend
from kqprefill.backends.cuda.batch_size import MOST_TOKENS, choose_batch, first_tokens
from kqprefill.backends.cuda.bounds import H100, Speed, free_from, operations
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.rehearsal import plan_model
from kqprefill.backends.cuda.weights.share import Share
from kqprefill.core import BATCH_TOKENS, FIRST_TOKENS
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile
from test_cli import kq

GIB = 1 << 30
HOPPER = kernel_set_of(H100.capability)


class Planned:
    """A model of a shape on an H100 with so much memory, and the tokens that have been planned for."""

    def __init__(self, name, gib):
        self.family, self._budget, self.asked = read_model(SyntheticFile.named(name)), int(gib * GIB), []
        self.speed = Speed(self.family, H100, HOPPER)

    def plan(self, tokens, ranks=False):
        self.asked.append(tokens)
        return plan_model(self.family, H100, HOPPER, self._budget, tokens, ranks=ranks)

    def choose(self):
        return choose_batch(self.speed, lambda tokens: self.plan(tokens, ranks=True))


def test_usual_batches_where_all_stays_and_nothing_else_is_looked_at():
    planned = Planned("qwen3-0.6b:Q4_K_M", 80)
    plan, size = planned.choose()
    assert size == BatchSize() == BatchSize(BATCH_TOKENS, FIRST_TOKENS, "") and not plan.streamed
    assert planned.asked == [BATCH_TOKENS] and "bus_rate" not in vars(planned.speed)


def test_usual_batches_where_they_hide_the_copies():
    planned = Planned("qwen3-32b:Q4_K_M", 8)
    plan, size = planned.choose()
    assert size.tokens == plan.tokens == BATCH_TOKENS and planned.asked == [BATCH_TOKENS]
    assert size.first == 4096  # 512 tokens would wait for the bus as long


@pytest.mark.parametrize("name", ["qwen3-30b-a3b:Q4_K_M", "gpt-oss-20b:MXFP4_MOE", "qwen3.6-35b-a3b:Q4_K_M"])
def test_experts_get_the_smallest_batch_that_has_the_rate_of_resident_layers(name):
    planned = Planned(name, 8)
    plan, size = planned.choose()
    assert BATCH_TOKENS < size.tokens == plan.tokens <= MOST_TOKENS and plan.nbytes <= 8 * GIB
    taken = planned.speed.seconds(plan, size.tokens, ranks=True)
    assert taken.share >= 0.97 and taken.copying < taken.resident
    smaller = size.tokens - 4096
    before = planned.speed.seconds(planned.plan(smaller, ranks=True), smaller, ranks=True)
    assert before.copying > 0.9 * before.resident or before.share < 0.97
    assert FIRST_TOKENS < size.first <= size.tokens
    assert f"batches of {size.tokens} tokens" in size.why and "hide" in size.why
    assert len(planned.asked) <= 6  # each is a rehearsal


def test_what_does_not_fit_is_not_chosen():
    """Qwen3.6-35B-A3B in 6 GiB: 20,480 targets and their rows of keys take more than that."""
    planned = Planned("qwen3.6-35b-a3b:Q4_K_M", 6)
    with pytest.raises(kqprefill.BackendError, match="tokens need at least"):
        planned.plan(20480, ranks=True)
    plan, size = planned.choose()
    assert BATCH_TOKENS < size.tokens == plan.tokens < 20480 and plan.nbytes <= 6 * GIB
    assert "does not hide" in size.why and f"{planned.speed.seconds(plan, size.tokens, True).share:.0%}" in size.why


def test_larger_batches_that_gain_nothing_are_not_chosen():
    """Where no batch hides the copies and a larger one only streams more, the smaller one stays."""
    plans = {n: SimpleNamespace(tokens=n, streamed=(1,)) for n in range(BATCH_TOKENS, MOST_TOKENS + 1, 4096)}
    speed = SimpleNamespace(
        seconds=lambda plan, tokens, ranks: SimpleNamespace(
            all=tokens * 1e-5,
            resident=tokens * 5e-6,
            computing=tokens * 5e-6,
            copying=tokens * 1e-5,
            bus=tokens * 1e-5,
            share=0.5,
        )
    )
    plan, size = choose_batch(speed, plans.__getitem__)
    assert plan.tokens == size.tokens == size.first == BATCH_TOKENS and "50% of the rate" in size.why


def test_operations_know_recurrences_and_windows():
    planned, dense = Planned("qwen3.6-35b-a3b:Q4_K_M", 80), Planned("qwen3-8b:Q4_K_M", 80)
    c = planned.family.config
    plan, n = planned.plan(1000), 1000
    done = operations(plan, planned.family, n)
    assert done.attention == 4 * c.q_width * 10 * n * (n + 1) // 2  # ten layers of forty
    assert (
        0 < done.recurrences < done.matrices and operations(plan, planned.family, 2 * n).matrices == 2 * done.matrices
    )
    full = operations(dense.plan(n), dense.family, n)
    assert full.recurrences == 0 and full.head == 0
    windowed = Planned("gpt-oss-20b:MXFP4_MOE", 80)
    config, count = windowed.family.config, windowed.family.config.block_count
    seen = sum(min(i + 1, 128) for i in range(n)) + n * (n + 1) // 2
    assert operations(windowed.plan(n), windowed.family, n).attention == 4 * config.q_width * count // 2 * seen
    scored = operations(plan, planned.family, n, ranks=True)
    assert scored.attention == 0 and scored.head == 2 * n * c.vocab_size * c.embedding_length


def test_the_plan_says_from_where_streaming_is_free():
    """With the plan of that length, which streams more than the one of a short prompt."""
    planned = Planned("qwen3-30b-a3b:Q4_K_M", 8)
    made = planned.plan(2048)
    free = free_from(planned.speed, made, planned.plan)
    assert planned.speed.free_under(made) < free
    for tokens, hidden in ((free, True), (free - 1024, False)):
        taken = planned.speed.seconds(planned.plan(tokens), tokens)
        assert (taken.copying <= taken.computing) == hidden and (taken.share > 0.9) == hidden
    # Measured on an H100: 0.16 of the resident rate.
    assert planned.speed.seconds(made, 2048).share == pytest.approx(0.16, abs=0.03)
    nothing_longer = free_from(planned.speed, made, lambda tokens: planned.plan(10**6))
    assert nothing_longer is None


def test_plan_tells_a_user_of_run():
    args = ("plan", "qwen3-30b-a3b:Q4_K_M", "--vram", "8G", "-p", "2048")
    out = kq(*args).stdout.decode()
    [line] = [line for line in out.splitlines() if line.startswith("a prompt of 2048 tokens has about")]
    told = json.loads(kq(*args, "--json").stdout)
    assert f"{told['share_of_resident_rate']:.0%} of the rate" in line
    assert f"-p {told['free_from_tokens']} would" in line and f"batches of {told['score_batch_tokens']} tokens" in line
    assert "a prompt of" not in kq("plan", "qwen3-32b:Q4_K_M", "--vram", "8G", "-p", "8192").stdout.decode()


# Who asks ------------------------------------------------------------------------------------------------------------


def test_the_caller_is_respected_and_nothing_changes():
    prompts = [[i % 250, *range(1, 2 + i % 40)] for i in range(60)]
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        sizes, usual = [], model.backend.batch_size
        model.backend.batch_size = lambda family, tokens=None, top=0, progress=None: (
            sizes.append(tokens) or (usual(family, tokens) if tokens else BatchSize(300, 200, "for a test"))
        )
        chosen, asked = (list(model.score(prompts, n)) for n in (None, 77))
        text = kqprefill.perplexity(model, list(range(200)) * 2, context=50)
        assert kqprefill.perplexity(model, list(range(200)) * 2, context=50, batch_tokens=50) == text
        assert sizes == [None, 77, None, 50]
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(chosen, asked, strict=True))


def cuda_backend_without_a_gpu(monkeypatch, name, gib, tokens):
    """A CudaBackend as after `load`, whose weights go nowhere; what it is of; and the plans that it has placed."""
    planned, placed = Planned(name, gib), []
    monkeypatch.setattr(
        cuda_backend, "plan_model", lambda family, *more, **named: plan_model(family, H100, HOPPER, *more[2:], **named)
    )
    backend = object.__new__(CudaBackend)
    device = SimpleNamespace(set_current=lambda: None)
    backend.gpu, backend.kernel_set = SimpleNamespace(device=device, index=0), HOPPER
    backend._budget, backend._caches, backend._ranks, backend._size = int(gib * GIB), [], False, None
    backend._speed, backend.plan = planned.speed, planned.plan(tokens)
    backend._collectors, backend._share, backend._least = [], Share.whole(planned.family), False
    backend._graphs = SimpleNamespace(clear=lambda: None)
    backend._weights = SimpleNamespace(plan=backend.plan, place=lambda plan, progress: placed.append(plan))
    return backend, planned, placed


def test_the_backend_makes_room_once(monkeypatch):
    backend, planned, placed = cuda_backend_without_a_gpu(monkeypatch, "qwen3-30b-a3b:Q4_K_M", 8, 4096)
    asked = backend.batch_size(planned.family, 6000)
    assert asked.tokens == 6000 == asked.first and not placed  # none of fewer would end sooner
    size = backend.batch_size(planned.family)
    assert size.tokens == backend.plan.tokens == 28672 and len(placed) == 1 and backend._ranks
    assert backend.batch_size(planned.family) is size and len(placed) == 1
    assert backend.batch_size(planned.family, 1000) == BatchSize(1000, 1000)
    assert backend.batch_size(planned.family, top=64) is size
    many = backend.batch_size(planned.family, top=1024)
    assert many.tokens == many.first == BATCH_TOKENS and "1024 likeliest" in many.why  # 352 MB of them, else


def test_too_little_memory_for_usual_batches_is_left_to_the_batches_that_come(monkeypatch):
    backend, planned, placed = cuda_backend_without_a_gpu(monkeypatch, "qwen3-32b:Q4_K_M", 3.5, 512)
    assert backend.batch_size(planned.family) == BatchSize() and not placed and not backend._ranks


def test_first_batches_are_small_where_all_stays():
    planned = Planned("qwen3-0.6b:Q4_K_M", 80)
    assert first_tokens(planned.speed, planned.plan(4096), 8192) == FIRST_TOKENS
    assert first_tokens(planned.speed, planned.plan(4096), 100) == 100


def test_what_was_chosen_is_said_to_people(capsys):
    from kqprefill.cli.common import say_batches

    chosen = BatchSize(20480, 16384, "batches of 20480 tokens: for a test")
    backend = SimpleNamespace(batch_size=lambda family, tokens, top: BatchSize(tokens) if tokens else chosen)
    say_batches(SimpleNamespace(backend=backend, family=None), None)
    say_batches(SimpleNamespace(backend=backend, family=None), 500)
    assert capsys.readouterr().err == "batches of 20480 tokens: for a test\n"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen35-tied-nextn", "qwen3next-moe-q3_k_m"])
@pytest.mark.parametrize("most", [1, 3])
def test_recurrences_in_parts_give_the_same_bits(monkeypatch, name, most, rng):
    """However many chunks are computed at a time: of packed sequences, of choices, of one prompt with and without a
    cache."""
    from kqprefill.backends.cuda.ops import recurrence

    path = ROOT / f"tests/data/{name}.gguf"

    def ids(n):
        return rng.integers(0, 128, n).tolist()

    records = [ids(int(n)) for n in rng.integers(2, 400, 30)]
    choices = [ids(int(n)) for n in rng.integers(1, 80, 4)]
    records += [{"tokens": ids(n), "choices": choices} for n in (10, 64, 150)]
    prompt = ids(500)

    def results():
        with kqprefill.load(path, backend="cuda") as model:
            scored = [s for r in model.score(records) for s in (r if isinstance(r, list) else [r])]
            cache = model.new_cache(500)
            parts = [model.prefill(piece, "all", cache).logits for piece in (prompt[:70], prompt[70:75], prompt[75:])]
            return [*(s.logprobs for s in scored), model.prefill(prompt, "all").logits, np.concatenate(parts)]

    expected = results()
    monkeypatch.setattr(recurrence, "CHUNKS_AT_ONCE", most)
    assert all(map(np.array_equal, expected, results()))
