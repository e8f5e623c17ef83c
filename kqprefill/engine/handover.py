"""States handed over: what a prompt leaves in a cache, written to a file that llama.cpp loads; and such a file read, to
go on here.

The layers' rows are written while later layers are computed: each layer's as soon as the backend has started it, by
threads that wait for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
import os
import time
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Cache, StateAccess
from ..core import Float32Array, Int32Array, KeysValues, Latent, Progress, Recurrent, no_progress
from ..errors import InputError, StateError
from ..gguf import dequantize
from ..models.deepseek2 import DeepSeek2
from ..models.family import Family
from ..models.latent import LatentAttention
from ..states.layout import FORMATS, AttentionLayer, StateOptions, StateShape
from ..states.read import StateFile
from ..states.write import StateWriter, whole_file
from .prefill import Prefill

_THREADS = 12  # that encode and write, or read, at most
_PIECE = 4096  # tokens of a layer that are read at a time
_AXES = {"qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"}  # whose positions have several axes in llama.cpp (M-RoPE)
_ONE_CACHE = {"phi3"}  # whose windows llama.cpp leaves out

_Rows = AbstractContextManager[tuple[NDArray[Any], NDArray[Any]]]


def state_shape(family: Family) -> StateShape:
    """What of a model its states depend on, as llama.cpp keeps them."""
    full: list[AttentionLayer] = []
    sliding: list[AttentionLayer] = []
    window, joined = 0, joined_latent(family)
    recurrent: list[tuple[int, Recurrent]] = []
    for index, state in family.state_parts():
        if isinstance(state, KeysValues):
            windowed = state.window is not None and family.architecture not in _ONE_CACHE
            kept = sliding if windowed else full
            kept.append(AttentionLayer(index, state.heads, state.head_dim, state.heads, state.head_dim))
            if windowed:
                window = max(window, state.window or 0)
        elif isinstance(state, Latent) and joined is not None:
            full.append(AttentionLayer(index, joined.heads, joined.head_dim, joined.heads, joined.value_dim))
        elif isinstance(state, Latent):
            full.append(AttentionLayer(index, 1, state.rank + state.rotary, 0, 0))
        elif isinstance(state, Recurrent):
            recurrent.append((index, state))
    layers, axes = len(family.layer_states), family.architecture in _AXES
    return StateShape(family.architecture, layers, tuple(full), tuple(sliding) or None, window, tuple(recurrent), axes)


def joined_latent(family: Family) -> LatentAttention | None:
    """The latent attention of a file whose attn_kv_b makes keys and values at once: llama.cpp keeps what it makes, not
    the latent rows."""
    return family.latent if isinstance(family, DeepSeek2) and family.latent.joined else None


class Saving:
    """A state on its way to a file; a context manager, which ends the threads.

    Of the first `cells` of `tokens`, the ids of the whole sequence. Raises as StateWriter does.
    """

    def __init__(
        self,
        backend: Backend,
        family: Family,
        cache: Cache,
        file: BinaryIO,
        options: StateOptions,
        tokens: Sequence[int],
        cells: int,
    ) -> None:
        self._backend, self._family, self._options, self._cells = backend, family, options, cells
        self._access: StateAccess = backend.state_access(family, cache)
        try:
            self._writer = StateWriter(file, state_shape(family), options, tokens, cells)
        except BaseException:
            self._access.close()
            raise
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        self._reader = ThreadPoolExecutor(1)  # waits until there is room for more rows, so that no launch does
        self._read: list[Future[None]] = []
        self._written: list[Future[None]] = []
        self._started: set[int] = set()

    def hears(self, progress: Progress) -> Progress:
        """A Progress for the batch after which the cache has the state: `progress`, and this, where it is told of
        layers."""
        if not self._backend.tells_layers:
            return progress

        def heard(stage: str, done: int, total: int) -> None:
            if stage == "prefill":
                self._start(done - 1, live=True)
            progress(stage, done, total)

        return heard

    def finish(self) -> float:
        """Once the batch is through: write what is left, and wait until all is written. Returns the seconds that took.

        Raises InputError for values that the state's types cannot hold; OSError.
        """
        begin = time.perf_counter()
        for layer, state in self._family.state_parts():
            if isinstance(state, Recurrent):
                self._writer.recurrence(layer, *self._access.recurrence(layer))
            else:
                self._start(layer, live=False)
        for read in self._read:
            read.result()
        for written in self._written:  # all of which is listed once all is read
            written.result()
        return time.perf_counter() - begin

    def _start(self, layer: int, live: bool) -> None:
        parts = self._family.layer_states[layer].parts
        state = next((part for part in parts if isinstance(part, (KeysValues, Latent))), None)
        if layer in self._started or state is None:
            return
        self._started.add(layer)
        wide = (self._options.keys, self._options.values) != ("f16", "f16")
        expand = _Expanding(self._family, layer) if isinstance(state, Latent) else None

        def take(first: int, rows: _Rows) -> None:
            self._written.append(self._pool.submit(self._write, layer, first, rows, expand))

        self._read.append(self._reader.submit(self._access.rows(layer, self._cells, wide, take, live)))

    def _write(self, layer: int, first: int, rows: _Rows, expand: _Expanding | None) -> None:
        with rows as (keys, values):
            if expand is None:
                self._writer.rows(layer, first, keys, values)
            else:
                self._writer.rows(layer, first, *expand(keys, values))

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=False)
        self._writer.close()
        self._access.close()


class _Expanding:
    """What llama.cpp keeps of a layer's latent rows c [n, rank] and k_r [n, rotary]: both side by side, or where the
    file has attn_kv_b the keys [n, heads * head_dim] and values [n, heads * value_dim] that it makes of them."""

    def __init__(self, family: Family, layer: int) -> None:
        self._latent, self._matrix = joined_latent(family), None
        if self._latent is not None:
            tensor = family.blocks[layer].attn_kv_b_weight.tensor
            self._matrix = dequantize(tensor.data, tensor.type).reshape(tensor.shape)

    def __call__(self, c: NDArray[Any], k_r: NDArray[Any]) -> tuple[Float32Array, Float32Array | None]:
        latent = self._latent
        if latent is None or self._matrix is None:
            return np.concatenate([c, k_r], axis=1, dtype=np.float32), None
        made = (c @ self._matrix.T).reshape(len(c), latent.heads, -1)
        shared = np.broadcast_to(k_r[:, None], (len(c), latent.heads, latent.rotary))
        keys = np.concatenate([made[..., : latent.key_dim], shared], axis=-1)
        return keys.reshape(len(c), -1), made[..., latent.key_dim :].reshape(len(c), -1)


def load_rows(backend: Backend, family: Family, cache: Cache, file: StateFile) -> None:
    """Make what a file holds an empty cache's content. Raises StateError for values that the model cannot have made."""
    with backend.state_access(family, cache, writing=True) as access:
        pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        written: list[Future[None]] = []
        try:
            for layer, state in family.state_parts():
                if isinstance(state, Recurrent):
                    access.write_recurrence(layer, *file.recurrence(layer))
                elif isinstance(state, (KeysValues, Latent)):
                    begins = range(0, file.cells, _PIECE)
                    written += [pool.submit(_load_piece, access, file, layer, state, begin) for begin in begins]
            for one in written:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)
    cache.length, cache.tokens = file.cells, file.tokens[: file.cells]


def _load_piece(access: StateAccess, file: StateFile, layer: int, state: KeysValues | Latent, begin: int) -> None:
    """Write _PIECE rows of a layer, from token `begin` on."""
    keys, values = file.keys_values(layer, begin, min(begin + _PIECE, file.cells))
    if isinstance(state, Latent):
        access.write(layer, begin, keys[:, : state.rank], keys[:, state.rank :])
        return
    assert values is not None, "a layer with values"
    shape = -1, state.heads, state.head_dim
    access.write(layer, begin, keys.reshape(shape), values.reshape(shape))


def open_state(family: Family, path: str) -> StateFile:
    """A state file of this model. Raises StateError as StateFile does, and where the model's rows cannot be had of
    it."""
    if joined_latent(family) is not None:
        raise StateError(
            f"{path}: states of a model with attn_kv_b hold keys and values, of which the latent rows that "
            "kqprefill keeps cannot be made; convert the model anew (attn_k_b, attn_v_b)"
        )
    try:
        file = StateFile(path, state_shape(family))
    except OSError as error:
        raise StateError(f"{path}: {error.strerror or error}") from None
    wrong = [token for token in file.tokens if not 0 <= token < family.config.vocab_size]
    if wrong:
        file.close()
        raise StateError(f"{path}: token {wrong[0]} is not in the model's vocabulary: another model's state")
    return file


class HandsOver(ABC):
    """What of a Model hands states over."""

    family: Family
    backend: Backend

    @abstractmethod
    def prefill(
        self, tokens: Any, logits: str | None = None, cache: Cache | None = None, progress: Progress | None = None
    ) -> Prefill:
        """As Model has it, and so the others."""

    @abstractmethod
    def new_cache(self, max_tokens: int) -> Cache: ...

    @abstractmethod
    def drop_cache(self, cache: Cache) -> None: ...

    @abstractmethod
    def _check_tokens(self, tokens: Any) -> Int32Array: ...

    @abstractmethod
    def _check_open(self) -> None: ...

    def save_state(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        tokens: Sequence[int] | NDArray[Any] = (),
        cache: Cache | None = None,
        logits: str | None = None,
        progress: Progress | None = None,
        hold_back: bool = False,
        **options: Any,
    ) -> Prefill:
        """Run a prompt as `prefill` does, and write the state that it leaves for llama.cpp to load (docs/handover.md).

        path: of the file, written whole or not at all; or a file that is open. tokens: ids, after those of the cache;
        none to write what a cache has. hold_back: leave the last token to the decoder, which for a recurrent model must
        be so where it goes on with the very same prompt. options: those of kqprefill.states.layout.StateOptions: format
        ("ggsq-4"), keys and values ("f16"), transposed, cells, streams. Layers are written while others are computed;
        timings["state"] is what writing took beyond that. Raises as `prefill` does; InputError where options contradict
        or the types cannot hold a value; KqprefillError where the file cannot be written.
        """
        self._check_open()
        chosen, ids = StateOptions(**options), self._check_tokens(tokens)
        opened = whole_file(path) if isinstance(path, (str, os.PathLike)) else nullcontext(path)
        with opened as file:
            return self._save(file, ids, cache, chosen, hold_back, logits, progress or no_progress)

    def _save(
        self,
        file: BinaryIO,
        tokens: Int32Array,
        cache: Cache | None,
        options: StateOptions,
        hold_back: bool,
        logits: str | None,
        progress: Progress,
    ) -> Prefill:
        held = 0 if cache is None else cache.length
        count = held + len(tokens)
        if cache is not None:
            cache.check()
        if not count:
            raise InputError("there are no tokens whose state could be saved; give a prompt")
        if cache is not None and len(cache.tokens) < held:
            raise InputError("the ids of the cache's tokens are not known, which a state lists")
        listed = [*(cache.tokens[:held] if cache is not None else ()), *tokens.tolist()]
        session = FORMATS[options.format].session
        cells = count - int(hold_back or session)  # llama-completion replays the last token of a session
        if not cells:
            raise InputError("a state that leaves out the last token wants two tokens at least")
        recurrent = self.family.has_recurrence
        if recurrent and cells < held:
            raise InputError("a recurrence cannot go back to before the cache's last token; give one token more")
        # A recurrence's state must be that after the cells' tokens: the others come in a batch of their own.
        now = tokens[: cells - held] if recurrent else tokens
        own = self.new_cache(count) if cache is None else cache
        try:
            ids = listed if session else listed[:cells]
            with Saving(self.backend, self.family, own, file, options, ids, cells) as saving:
                result = self.prefill(now, logits if len(now) == len(tokens) else None, own, saving.hears(progress))
                timings = {**result.timings, "state": saving.finish()}
            if len(now) < len(tokens):
                result = self.prefill(tokens[len(now) :], logits, own, progress)
                timings["prefill"] += result.timings["prefill"]
        finally:
            if cache is None:
                self.drop_cache(own)
        return replace(result, prompt_tokens=len(tokens), timings=timings)

    def load_state(self, path: str | os.PathLike[str], room: int = 0) -> tuple[Cache, list[int]]:
        """A new cache with the state in a file of `save_state` or of llama.cpp, with room for so many tokens more; and
        the tokens that the file lists without having their state, which are to come first.

        Raises StateError, a line that names the file: not a state, cut short, of an unknown version, or of a model of
        another shape; InputError where there is no room for it in the model's context.
        """
        self._check_open()
        with open_state(self.family, os.fspath(path)) as file:
            most, held = self.family.config.context_length, len(file.tokens)
            if held + room > most:
                raise InputError(f"{file.path}: {held} tokens and {room} more are past the context length of {most}")
            cache = self.new_cache(held + room)
            try:
                load_rows(self.backend, self.family, cache, file)
            except BaseException:
                self.drop_cache(cache)
                raise
            return cache, file.tokens[file.cells :]
