"""The states in a GPU's caches: with memory of the host in place of a GPU's, and (gpu) on one."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import CASES, found, kl_divergence, relative_error
from host_gpu import Buffer, Event, HostGpu
import kqprefill
from kqprefill.backends.base import whole_rows
from kqprefill.backends.cuda.device.arrays import FLOAT32, DeviceArray
from kqprefill.backends.cuda.gemm.operand import operand_positions
from kqprefill.backends.cuda.kv_cache import DeviceCache, HostCache, state_bytes
from kqprefill.backends.cuda.ops.chunk_layout import chunk_layout
from kqprefill.backends.cuda.state_access import _SLOT_BYTES, _SLOTS, DeviceStates, _scaled
from kqprefill.core import KeysValues, Latent, Recurrent, Segment
from kqprefill.errors import BackendError, InputError, StateError
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile

WANTED = "qwen3-q8_0 phi3-q4_k_m gemma4-q4_k_m deepseek2-moe-glm47-q3_k_m qwen35-tied-nextn qwen35-q4_k_m "
WANTED += "lfm2-q2_k nemotron_h-q2_k falcon-h1-q2_k kimi-linear-moe-q2_k"
FAMILIES = [path.stem for path in found(WANTED)]


@pytest.fixture
def gpu():
    return HostGpu()


def family_of(name):
    return read_model(GGUFFile(str(CASES[name])))


def cache_of(kind, gpu, family, capacity, scales=(64.0, 0.25)):
    cache = kind(gpu, family.layer_states, capacity)
    held = [Buffer(4) for _ in scales]
    for buffer, scale in zip(held, scales):
        buffer.memory.view(np.float32)[0] = scale
    for layer in range(len(family.layer_states)):
        cache.note_scales(layer, *(DeviceArray(buffer.handle, FLOAT32, (1,)) for buffer in held))
    cache.held_scales = held
    return cache


def shapes_of(state, n):
    if isinstance(state, KeysValues):
        return ((n, state.heads, state.head_dim),) * 2
    if isinstance(state, Latent):
        return (n, state.rank), (n, state.rotary)
    return (state.heads, state.key_dim, state.value_dim), (state.taps, state.channels)


def numbers(rng, shape):
    """Numbers that halves hold, times the scales of cache_of, too."""
    return (rng.integers(-2000, 2000, shape) / 64).astype(np.float32)


def taken(start):
    """Both arrays of rows that start(take) has on their way, copied by several threads."""
    pieces, futures = {}, []

    def copy(first, rows):
        with rows as held:
            pieces[first] = [a.copy() for a in held]

    with ThreadPoolExecutor(3) as pool:
        start(lambda first, rows: futures.append(pool.submit(copy, first, rows)))
    for future in futures:
        future.result()
    assert len(pieces) == len(futures)
    return [np.concatenate([pieces[first][number] for first in sorted(pieces)]) for number in (0, 1)]


@pytest.mark.parametrize("kind", [DeviceCache, HostCache])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read(gpu, name, kind, rng, monkeypatch):
    """Without a GPU: by halves, which the numbers written are, and floats; in pieces and in other threads."""
    monkeypatch.setattr("kqprefill.backends.cuda.state_access._HOST_PIECE", 7)
    monkeypatch.setattr("kqprefill.backends.cuda.state_access._WRITTEN", 5000)
    family, n = family_of(name), 53
    cache = cache_of(kind, gpu, family, 60)
    with DeviceStates(SimpleNamespace(gpu=gpu), family, cache) as access:
        for layer, state in family.state_parts():
            if not isinstance(state, (KeysValues, Latent, Recurrent)):
                continue
            given = [numbers(rng, shape) for shape in shapes_of(state, n)]
            cache.length = n
            if isinstance(state, Recurrent):
                access.write_recurrence(layer, *given)
                got = access.recurrence(layer)
                assert not given[0].size or relative_error(given[0], got[0]) < 1e-5
                assert np.array_equal(given[1], got[1])
                continue
            for part in (slice(20, n), slice(20)):  # one of float32, the other of halves
                kind_of = np.float32 if part.start else np.float16
                access.write(layer, part.start or 0, *(rows[part].astype(kind_of) for rows in given))
            for wide in (True, False):
                whole = taken(lambda take, wide=wide, layer=layer: access.rows(layer, n, wide, take)())
                assert all(np.array_equal(a, b) for a, b in zip(whole, given))
            assert all(np.array_equal(a, b) for a, b in zip(whole_rows(access, layer, n), given))
        if kind is HostCache:  # nothing of it was on the device
            assert len(access._slots) == 0
    cache.close()


@pytest.mark.parametrize("name", ["qwen3.6-27b:Q4_K_M", "gemma4-e4b:Q4_K_M", "deepseek-v2-lite:Q4_K_M"])
def test_layers_that_share_rooms_on_the_device(name):
    """A layer's room is neither its neighbours' nor, where it holds floats, one in which attention reads halves: those
    that it multiplies by zero must not be NaN."""
    states = read_model(SyntheticFile.named(name)).layer_states
    nbytes, starts = HostCache._places(states, 1000)
    ranges = [range(start, start + state_bytes(state, 1000)) for start, state in zip(starts, states)]
    assert nbytes == max(own.stop for own in ranges) == HostCache.bytes_needed(states, 1000)
    assert nbytes < DeviceCache.bytes_needed(states, 1000)

    def apart(a, b):
        return a.stop <= b.start or b.stop <= a.start

    assert all(map(apart, ranges, ranges[1:]))
    floats = [own for own, state in zip(ranges, states) if isinstance(state, Recurrent)]
    halves = [own for own, state in zip(ranges, states) if not isinstance(state, Recurrent)]
    assert all(apart(a, b) for a in floats for b in halves)


def test_more_rows_than_slots(gpu, rng):
    """Slots go round as somebody takes their rows."""
    family = family_of("qwen3-q8_0")
    state = family.layer_states[0]
    n = 2 * _SLOTS * (_SLOT_BYTES // (2 * 2 * state.width))
    cache = cache_of(DeviceCache, gpu, family, n)
    rows = numbers(rng, (n, state.heads, state.head_dim))
    with DeviceStates(SimpleNamespace(gpu=gpu), family, cache) as access:
        access.write(0, 0, rows, rows)
        got = taken(lambda take: access.rows(0, n, False, take, live=True)())
        assert all(np.array_equal(rows, part) for part in got)
    assert not gpu.blocks


def test_values_that_do_not_fit(gpu, rng):
    """Those that f16 cannot hold; and those that the scales say this model cannot have made."""
    family = family_of("qwen3-q8_0")
    cache = cache_of(DeviceCache, gpu, family, 8, scales=(2.0**-4, 64.0))
    shape = shapes_of(family.layer_states[0], 8)[0]
    large, small = np.full(shape, 1e5, np.float32), np.ones(shape, np.float32)
    with DeviceStates(SimpleNamespace(gpu=gpu), family, cache) as access:
        access.write(0, 0, large, small)
        taken = []
        access.rows(0, 8, False, lambda first, rows: taken.append(rows))()
        with pytest.raises(InputError, match="layer 0: the state has a value that f16 cannot hold; use f32"), taken[0]:
            pass
        assert relative_error(large, whole_rows(access, 0, 8)[0]) < 1e-3
        with pytest.raises(StateError, match="layer 0: the state has values that this model cannot have made"):
            access.write(0, 0, small, large)


def test_halves_times_powers_of_two_are_those_of_floats():
    """Every half: the same bits as by way of float32, and refused where that is infinite."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for power in (-40, -30, -25, -16, -3, 0, 1, 9, 16, 30, 60):
        scale = np.float32(2.0**power)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (every.astype(np.float32) * scale).astype(np.float16)
        fits = np.isfinite(expected) & np.isfinite(every)
        got = _scaled(every[fits], scale)
        assert np.array_equal(got.view(np.uint16), expected[fits].view(np.uint16)), power
        assert np.array_equal(got, _scaled(every[fits].astype(np.float32), scale))
        assert all(_scaled(every[at : at + 1], scale) is None for at in np.flatnonzero(~fits & (every == every))[::97])


def test_a_device_that_fails_meanwhile_is_one_line(gpu, monkeypatch):
    """Whoever waits for rows is told as any other: in a thread that writes them, or at the end."""
    family, taken_rows = family_of("qwen3-q8_0"), []
    cache = cache_of(DeviceCache, gpu, family, 9)
    access = DeviceStates(SimpleNamespace(gpu=gpu), family, cache)
    access.rows(0, 9, True, lambda first, rows: taken_rows.append(rows))()

    def failing(event):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS:\nan illegal memory access")

    monkeypatch.setattr(Event, "sync", failing)
    with pytest.raises(BackendError, match=r"^reading a state: CUDA_ERROR_ILLEGAL_ADDRESS: an"), taken_rows[0]:
        pass
    with pytest.raises(BackendError, match=r"^reading a state: "):
        access.close()


def test_operand_positions():
    """As include/operand.cuh writes them down."""
    first = [0, 1, 16, 17, 32, 33, 48, 49, 2, 3, 18, 19, 34, 35, 50, 51, 4, 5, 20, 21]
    assert np.argsort(operand_positions(64))[:20].tolist() == first
    assert sorted(operand_positions(192).tolist()) == list(range(192)) and operand_positions(70)[64:].min() == 64


def test_a_sequence_of_fewer_tokens_than_a_chunk_goes_on_from_its_state():
    """Zeros where it was computed here; what was loaded, else."""
    for position, source in ((0, -1), (3, 0), (64, 0)):
        layout = chunk_layout([Segment(0, 5, position)], keep=True)
        assert layout.sequences[0].tolist() == [[0, 1, source, 0]] and layout.states == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("kind", [DeviceCache, HostCache])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_of_both_backends(name, kind, kernels, rng, tmp_path, monkeypatch):
    """What the GPU saves the CPU goes on with, and the reverse, at lengths within chunks and at their ends."""
    monkeypatch.setattr("kqprefill.backends.cuda.backend.DeviceCache", kind)
    path = CASES[name]
    with kqprefill.load(path, backend="cpu") as cpu, kqprefill.load(path, backend="cuda", kernels=kernels) as cuda:
        for n in (20, 64, 150):
            prompt = rng.integers(3, cpu.config.vocab_size, n + 7).tolist()
            exact = cpu.prefill(prompt, logits="last").logits
            for maker, reader in ((cuda, cpu), (cpu, cuda), (cuda, cuda)):
                for types in ("f16", "f32"):
                    maker.save_state(tmp_path / "state", prompt[:n], keys=types, values=types)
                    cache, _ = reader.load_state(tmp_path / "state", room=7)
                    reader.prefill(prompt[n : n + 2], cache=cache)
                    got = reader.prefill(prompt[n + 2 :], logits="last", cache=cache).logits
                    assert kl_divergence(exact, got) < 1e-3, (n, maker.backend.name, reader.backend.name, types)
                    reader.drop_cache(cache)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [DeviceCache, HostCache])
@pytest.mark.parametrize("name", FAMILIES)
def test_saving_changes_no_bit(name, kind, rng, tmp_path, monkeypatch):
    """Of what is computed; and what is written while a batch runs is what is written after it."""
    monkeypatch.setattr("kqprefill.backends.cuda.backend.DeviceCache", kind)
    with kqprefill.load(CASES[name], backend="cuda") as model:
        prompt = rng.integers(3, model.config.vocab_size, 300).tolist()
        cache = model.new_cache(300)
        plain = model.prefill(prompt, logits="last", cache=cache).logits
        model.save_state(tmp_path / "after", [], cache)
        saved = model.save_state(tmp_path / "during", prompt, logits="last").logits
        assert np.array_equal(plain, saved)
        assert (tmp_path / "after").read_bytes() == (tmp_path / "during").read_bytes()
