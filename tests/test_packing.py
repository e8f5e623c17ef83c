"""Which records share a batch: in order, never more of them than planned for, in no more batches than if each were
filled, and none small without need."""

from dataclasses import replace
import io
from itertools import pairwise
import re
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.backends.base import BatchSize
from kqprefill.cli.records import Records
from kqprefill.cli.score import _Run
from kqprefill.core import KEYS_PER_TOKEN
from kqprefill.corpus.results import Wanted
from kqprefill.engine import packing
from kqprefill.engine.logits_file import save_logits
from kqprefill.engine.packing import packs
from kqprefill.engine.perplexity import perplexity
from kqprefill.engine.scoring import Item
from kqprefill.engine.windows import Windows

STREAMED = 24_576, 12_288  # where layers are streamed; and the first of these batches


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


@pytest.fixture
def ran(model, monkeypatch):
    """The tokens of each batch that the model's backend has run, so far."""
    sizes, run = [], model.backend.run

    def counted(family, batch, *args, **more):
        sizes.append(len(batch.tokens))
        return run(family, batch, *args, **more)

    monkeypatch.setattr(model.backend, "run", counted)
    return sizes


def fits(group, batch_tokens):
    """Whether there is room for a batch; one piece alone must have it."""
    tokens, keys = (sum(getattr(piece, what) for piece, _ in group) for what in ("tokens", "keys"))
    return len(group) == 1 or (tokens <= batch_tokens and keys <= KEYS_PER_TOKEN * batch_tokens)


def filled(items, batch_tokens, first_tokens):
    """Batches that each take what they have room for, whatever is left for the last one."""
    groups, limit = [[]], min(batch_tokens, first_tokens)
    for item in items:
        pieces = item.pieces(batch_tokens)
        for piece in pieces:
            entry = piece, piece is pieces[-1]
            if not fits([*groups[-1], entry], limit):
                groups.append([])
                limit = min(batch_tokens, 2 * limit)
            groups[-1].append(entry)
    return groups


def sizes_of(groups):
    return [sum(piece.tokens for piece, _ in group) for group in groups]


def of_lengths(lengths):
    return [Item([1] * int(n)) for n in lengths]


@pytest.mark.parametrize(
    "lengths,limits,expected",
    [
        ([64] * 257, (8192, 8192), [8192, 4160, 4096]),  # not 8192, 8192, 64
        ([64] * 129, (8192, 8192), [4160, 4096]),
        ([64] * 192, (8192, 8192), [8192, 4096]),  # half as many are enough
        ([100] * 6, (8192, 512), [600]),  # small batches come first, but not for so few
        ([100] * 8, (8192, 512), [500, 300]),
        ([90, 20], (100, 100), [90, 20]),  # records are whole
        ([50, 40, 20], (100, 100), [50, 60]),
        ([250, 20], (100, 100), [250, 20]),  # a prompt longer than a batch
        ([30, 60, 20, 95, 5], (100, 100), [30, 80, 100]),  # in the middle, too
        ([96] * 385, STREAMED, [12_288, 12_384, 12_288]),  # not 12,288, 24,576, 96: each copies the layers
    ],
)
def test_batches_of_these_lengths(lengths, limits, expected):
    assert sizes_of(packs(of_lengths(lengths), *limits)) == expected


@pytest.mark.parametrize("batch_tokens,first_tokens", [(8192, 8192), (8192, 512), (1000, 100), STREAMED])
def test_the_smallest_batch_is_half_the_largest_but_for_a_record(batch_tokens, first_tokens, rng):
    for _ in range(30):
        longest = int(rng.integers(1, batch_tokens // 4))
        items = of_lengths(rng.integers(1, longest + 1, rng.integers(1, 400)))
        groups = list(packs(items, batch_tokens, first_tokens))
        before = filled(items, batch_tokens, first_tokens)
        sizes, old = sizes_of(groups), sizes_of(before)
        assert [piece for group in groups for piece, _ in group] == items
        assert all(fits(group, batch_tokens) for group in groups) and len(groups) <= len(before)
        assert 2 * sizes[0] <= 3 * old[0] or longest > first_tokens  # the first one still comes soon
        assert all(2 * b + longest >= a for a, b in pairwise(sizes)), (sizes, old)
        if first_tokens == batch_tokens and len(sizes) > 1:
            assert 2 * min(sizes) + longest >= max(sizes), (sizes, old)


@pytest.mark.parametrize("batch_tokens,first_tokens", [(2000, 2000), (2000, 128), (300, 300)])
def test_choices_keep_their_order_and_their_room(batch_tokens, first_tokens, rng):
    """Prompts that many choices share, longer and shorter than a batch, and with more rows of keys than tokens."""

    def ids(most):
        return [1] * int(rng.integers(1, most))

    for _ in range(30):
        items = [
            Item(ids(400), [ids(6) for _ in range(rng.integers(1, 60))], True) if rng.random() < 0.5 else Item(ids(400))
            for _ in range(40)
        ]
        groups, before = list(packs(items, batch_tokens, first_tokens)), filled(items, batch_tokens, first_tokens)
        assert [entry for group in groups for entry in group] == [entry for group in before for entry in group]
        assert all(group and fits(group, batch_tokens) for group in groups) and len(groups) <= len(before)


def test_nothing_is_held_back_where_none_is_left():
    """None gives all that came before, evened out, and begins anew."""
    items = of_lengths([50, 40, 20])
    groups = packs([None, *items, None, items[0], None, *items], 100)
    sizes = [group and sizes_of([group])[0] for group in groups]
    assert sizes == [None, 50, 60, None, 50, None, 50, 60]


@pytest.mark.parametrize(
    "lengths,limits,first,taken",
    [
        ([100] * 12, (500, 500), 500, 8),
        ([100] * 12, (500, 200), 200, 3),
        ([2000, *[100] * 12], (500, 500), 2000, 4),  # of a batch, not of a longer prompt
    ],
)
def test_a_batch_is_given_once_the_next_is_half_full(lengths, limits, first, taken):
    """A source that has no end known is asked for no more than that."""
    asked = []

    def slow():
        for length in lengths:
            asked.append(length)
            yield Item([1] * length)
        pytest.fail("more was waited for")

    assert sizes_of([next(packs(slow(), *limits))]) == [first] and len(asked) == taken


def test_all_ways_in_have_no_small_last_batch(model, ran, monkeypatch):
    """Not one of score, embed and perplexity, and each as many batches as its records fill."""
    monkeypatch.setattr(model.backend, "batch_size", lambda family, tokens=None, *more: BatchSize(tokens, tokens))
    ids = [[1, *range(50)] for _ in range(21)]  # a score leaves each last token out
    assert len(list(model.score(ids, 1020))) == 21 and ran == [550, 500]
    ran.clear()
    assert len(list(model.embed(ids, "last", batch_tokens=1020))) == 21 and ran == [561, 510]
    ran.clear()
    perplexity(model, [1] * 21 * 51, 51, batch_tokens=1020)
    assert ran == [550, 500]


def test_evening_out_changes_no_bit(model, ran, rng, monkeypatch):
    """Of scores, shared prompts among them, and of vectors; nor the results' order."""
    ids = [rng.integers(0, 256, 1 + 7 * i * i % 41).tolist() for i in range(40)]
    records = [{"tokens": one, "choices": [one[:3], ids[0][:9]]} if i % 5 == 3 else one for i, one in enumerate(ids)]

    def results(batch_tokens):
        for scored in model.score(records, batch_tokens, top=2):
            for one in scored if isinstance(scored, list) else [scored]:
                yield [one.tokens, one.logprobs, one.top_tokens, one.top_logprobs]
        for vector in model.embed(ids, "mean", batch_tokens=batch_tokens):
            yield [vector]

    for batch_tokens in (150, 270, 400):
        ran.clear()
        evened, sizes = list(results(batch_tokens)), list(ran)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_evened", lambda held, small, _: [load for load in (held, small) if load.group])
            ran.clear()
            plain = list(results(batch_tokens))
        assert len(sizes) <= len(ran) and sizes != ran
        for one, other in zip(evened, plain, strict=True):
            assert all(map(np.array_equal, one, other))


def test_windows_are_shared_out(model, ran, rng):
    """Batches of windows differ by one at most; the file of logits, llama.cpp's, has the same bytes."""
    windows = Windows(rng.integers(0, 256, (16, 32)).astype(np.int32))

    def saved(batch_tokens):
        ran.clear()
        file = io.BytesIO()
        save_logits(model, windows, file, batch_tokens)
        return file.getvalue()

    whole = saved(16 * 31)
    assert saved(15 * 31) == whole and ran == [8 * 31, 8 * 31]
    assert saved(5 * 31 + 30) == whole and ran == [4 * 31] * 4
    assert saved(1) == whole and ran == [31] * 16
    assert saved(7 * 31) == whole and ran == [6 * 31, 5 * 31, 5 * 31]


def test_a_perplexitys_progress_is_of_what_runs(model, rng):
    """Whatever has been taken ahead of it: of 10, 20 and 10 windows each layer in its turn."""
    heard, layers = [], model.config.block_count
    perplexity(model, rng.integers(0, 256, 2000), 50, progress=lambda *what: heard.append(what))
    batches = [(0, 10), (10, 20), (30, 10)]
    told = [before * layers + count * (layer + 1) for before, count in batches for layer in range(layers)]
    assert heard == [("windows", done, 40 * layers) for done in told]


class Given(list):
    """Records of 100 bytes each that are all there, as Records gives them."""

    nbytes, name, several, last_skipped = 1500, "in", False, None


def test_a_scores_progress_is_of_what_runs(model, tmp_path):
    """Up to the last record of a batch, whatever has been taken ahead of it: of 5 and 10 records each layer."""
    (tmp_path / "in").write_bytes(b'{"tokens": [%s]}' % b",".join([b"1"] * 100))
    read = next(iter(Records([str(tmp_path / "in")], model.item)))
    records = Given(replace(read, index=i, end=(i + 1) * 100) for i in range(15))
    heard, written = [], []
    lines = SimpleNamespace(done=0, written=0, bad=0, last=None, write=written.append)
    run = _Run(model, records, lines, Wanted(), False, None, lambda *what: heard.append(what))
    run.go(None, 0)
    assert len(written) == 15 and all(re.fullmatch(r"\d+ records, [1-9]\d* tokens/s", note) for *_, note in heard)
    assert list(dict.fromkeys(done for _, done, _, _ in heard)) == [250, 500, 1000, 1500]
