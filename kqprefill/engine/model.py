"""The library's front: a model opened on a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import logging
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..backends import open_backend, precision_called
from ..backends.base import Backend, Cache
from ..backends.budget import Budget
from ..backends.devices import Devices
from ..core import Batch, Float32Array, HeadResult, Int32Array, Logits, Progress, no_progress
from ..errors import InputError, ModelError
from ..gguf import GGUFFile, ModelFile
from ..gguf.vocabulary import token_text
from ..models import read_model
from ..models.config import Config
from ..models.family import Family
from ..models.precision import Precision, takes_int8
from ..terminal import shown
from .checks import refuse_non_finite, token_ids
from .embedding import Normalise, closing_token, pooling_of, vectors
from .handover import HandsOver
from .packing import packs
from .prefill import Prefill
from .scoring import Group, Item, Record, Running, Scored, item_of, no_ranks, packed

if TYPE_CHECKING:
    from ..text import Tokenizer
    from ..text.chat import Chat

_LOGITS = (None, "last", "all")
_LOG = logging.getLogger("kqprefill")


class Model(HandsOver):
    """A model ready to prefill; a context manager, freed by `close`. Made by `kqprefill.load`.

    precision: "exact" or "int8", what its matrices are multiplied as.
    """

    def __init__(
        self, file: ModelFile, family: Family, backend: Backend, timings: dict[str, float], precision: Precision
    ) -> None:
        self.file, self.family, self.backend, self.timings = file, family, backend, timings
        self.precision = precision
        self._caches: list[Cache] = []
        self._tokenizer: Tokenizer | None = None
        self._last_chat: Chat | None = None
        self._last_template: str | None = None
        self._closed = False

    def __repr__(self) -> str:
        config, where = self.config, f"{self.backend.name} ({self.backend.device_name})"
        return (
            f"<Model {shown(self.file.path)}: {shown(self.file.metadata.get('general.architecture'))}, "
            f"{len(self.family.blocks)} layers, vocabulary {config.vocab_size}, context {config.context_length}, "
            f"{'closed' if self._closed else f'{self.precision} on {where}'}>"
        )

    @property
    def config(self) -> Config:
        """Sizes and constants."""
        return self.family.config

    @np.errstate(all="ignore")  # what overflows is told by its result, not by NumPy on stderr
    def prefill(
        self,
        tokens: Sequence[int] | np.ndarray[Any, Any],
        logits: str | None = None,
        cache: Cache | None = None,
        progress: Progress | None = None,
        timed: bool = False,
    ) -> Prefill:
        """Run the prompt and give its greedy next token.

        tokens: ids, any integer sequence [T]; an empty one is a no-op. logits: which to return, None, "last" or "all".
        cache: a cache of this model's `new_cache`; the prompt continues at cache.length, which grows by T.
        progress(stage, done, total) hears of compiling and of each layer. timed: also measure each stage, which costs a
        little and, on a GPU, launches kernels one by one. Raises InputError for bad ids, a prompt past
        the context length or past the cache's room, or a model that has been closed; BackendError where the device
        fails, or where the logits that are returned, or the greedy token's, are not finite: it names the position.
        """
        self._check_open()
        self._check_causal()
        start_time = time.perf_counter()
        if logits not in _LOGITS:
            raise InputError(f"logits={logits!r} is unknown; choose None, 'last' or 'all'")
        if cache is not None and not any(cache is own for own in self._caches):
            raise InputError("the cache is not one that this model's new_cache made")
        ids = self._check_tokens(tokens)
        start = 0 if cache is None else cache.length
        if len(ids) == 0:
            empty = np.empty((0, self.config.vocab_size), np.float32) if logits == "all" else None
            return Prefill(None, None, None, empty, 0, {"prefill": 0.0})
        self._check_room(start, len(ids), cache)
        if cache is not None:
            cache.broken = self.family.has_recurrence  # until it is done
        wanted = cast(Logits, logits)
        pending, stages = self.backend.run(
            self.family, Batch(ids, start), cache, wanted, progress or no_progress, timed
        )
        head = cast(HeadResult, pending())
        refuse_non_finite(head.logits, head.logit, head.logprob, start, len(ids))
        if cache is not None:
            cache.length, cache.broken = start + len(ids), False
            cache.tokens[start:] = ids.tolist()
        timings = {"prefill": time.perf_counter() - start_time}
        result = Prefill(head.token, head.logit, head.logprob, head.logits, len(ids), timings, stages)
        _LOG.debug("%d tokens, %.0f tokens/s", len(ids), result.tokens_per_second)
        return result

    def score(
        self,
        records: Iterable[Record | Item | None],
        batch_tokens: int | None = None,
        top: int = 0,
        progress: Progress | None = None,
        parse_special: bool = True,
        chat_template: str | None = None,
        starts: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """The log-probabilities of many prompts, packed into batches: a generator of a Scored
        (kqprefill.engine.scoring) for each record, or of a list of them where it has "choices".

        records: each a sequence of token ids, whose tokens but the first are scored; or a mapping with "tokens" (ids),
        "prompt" (text) or "messages" (a conversation, for the chat template), and perhaps "completion" or "choices"
        (one or several continuations, ids or texts, scored given the prompt); or an Item of `item`. None among them has
        all before it computed at once, rather than wait for a full batch. batch_tokens: of a batch, at most, but for
        one longer prompt; None for 8192, or where layers are streamed for as many more, up to 32768, as hide their
        copies over the bus. top: how many likeliest tokens to name at each place. progress(stage, done, total) hears of
        compiling and of each batch's layers, starts(count) before these of how many records the batch completes (about
        half a batch more are taken ahead). parse_special, chat_template: as in `tokenize` and `tokenize_chat`. The
        first batches are smaller where their results come sooner so. Logits stay on the device; results are the same
        however records are packed. Where a record's logits are not finite, so are its log-probabilities: they are
        handed on as they are, since the others are sound (`kqprefill score` reports such a record as one that failed).
        Raises InputError for a bad record, or a model that has been closed; ModelError where the file has no tokenizer
        or template that a record needs; BackendError.
        """
        self._check_open()
        self._check_causal()
        if (batch_tokens is not None and batch_tokens < 1) or not 0 <= top <= self.config.vocab_size:
            most = self.config.vocab_size
            raise InputError(f"batch_tokens {batch_tokens} and top {top}: at least 1, and 0 to the vocabulary's {most}")
        items = (r if r is None or isinstance(r, Item) else self.item(r, parse_special, chat_template) for r in records)
        size = self.backend.batch_size(self.family, batch_tokens, top, progress or no_progress)
        _LOG.info("%s", size.why or f"batches of {size.tokens} tokens")
        groups = packs(items, size.tokens, size.first)
        hears = starts or (lambda count: None)
        started = (None if group is None else self._start(group, top, progress, hears) for group in groups)
        partial: list[Scored] = []  # of a record whose last batch has not been read
        for running in self.backend.in_turn(started):
            yield from running.finish(partial)

    def embed(
        self,
        prompts: Iterable[Sequence[int] | str | None],
        pooling: str | None = None,
        normalise: Normalise = "l2",
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Float32Array]:
        """The vectors of many prompts, packed into batches: a generator of float32 [H], one for each.

        prompts: each token ids, or a text, which `embedding_ids` reads; None among them has all before it computed at
        once. pooling: "last", "mean" or "cls" (the first), of the final norm's outputs at a prompt's positions; None
        for what the file says. normalise: "l2", or "none". batch_tokens, progress: as in `score`. The output matrix is
        not computed; vectors are the same however prompts are packed. A vector that is not finite is handed on as it
        is. Raises InputError for a bad prompt, a pooling that is not known, or a model that has been closed;
        ModelError; BackendError.
        """
        self._check_open()
        how = pooling_of(self.family, pooling)
        ids = (None if prompt is None else self.embedding_ids(prompt) for prompt in prompts)
        return vectors(self.backend, self.family, ids, how, normalise, batch_tokens, progress or no_progress)

    def embedding_ids(self, prompt: Sequence[int] | str) -> list[int]:
        """A prompt's ids as `embed` computes them: a text's as `tokenize` gives them, and with the end token where the
        model wants it last. Raises as `tokenize` does; InputError for bad ids, none, or more than the context."""
        self._check_open()
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._check_tokens(prompt).tolist()
        closing = closing_token(self.family) if isinstance(prompt, str) else None
        if closing is not None and ids[-1:] != [closing]:
            ids.append(closing)
        if not ids:
            raise InputError("the prompt is empty")
        self._check_room(0, len(ids), None)
        return ids

    def item(self, record: Record, parse_special: bool = True, chat_template: str | None = None) -> Item:
        """A record, checked and tokenised (`score`). Raises InputError; ModelError where the file has no vocabulary of
        a supported kind, or no chat template."""
        self._check_open()
        item = item_of(
            record,
            lambda ids: self._check_tokens(ids).tolist(),
            lambda text: self.tokenize(text, parse_special=parse_special),
            lambda messages, generation: self._chat(chat_template).encoder(messages, generation, parse_special),
        )
        self._check_room(0, item.longest, None)
        return item

    @np.errstate(all="ignore")
    def _start(self, group: Group, top: int, progress: Progress | None, starts: Callable[[int], None]) -> Running:
        self._check_open()
        starts(sum(last for _, last in group))
        batch, places = packed([piece for piece, _ in group], top)
        if batch.targets is not None and len(batch.targets.rows):
            pending, _ = self.backend.run(self.family, batch, None, "ranks", progress or no_progress)
        else:
            pending = no_ranks(top)
        return Running(group, batch, places, pending)

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """A text's token ids, by the file's own tokenizer.

        add_special: with the BOS and EOS that the file asks for. parse_special: False reads the texts of control tokens
        in it (`<start_of_turn>`) as plain text. Raises ModelError where the file has no vocabulary of a supported kind,
        InputError where the `tokenizers` library, which byte-level BPE needs, is missing or the text is not valid
        Unicode.
        """
        self._check_open()
        return self.tokenizer().encode(text, add_special, parse_special)

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        parse_special: bool = True,
        chat_template: str | None = None,
    ) -> list[int]:
        """A conversation's token ids, by the file's own chat template, or another (Jinja).

        messages: each {"role": …, "content": …}. add_generation_prompt: with the beginning of the answer, as the
        template has it. parse_special: False reads the texts of control tokens in the messages as plain text; what the
        template writes is read with them. Raises as `tokenize` does; InputError where the template cannot be rendered,
        or jinja2 is missing; ModelError where the file has none.
        """
        self._check_open()
        return self._chat(chat_template).encoder(list(messages), add_generation_prompt, parse_special)("")

    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer. Raises as `tokenize` does."""
        if self._tokenizer is None:
            from ..text import Tokenizer

            self._tokenizer = Tokenizer(self.file.metadata, self.file.path)
        return self._tokenizer

    def token_text(self, token: int) -> str | None:
        """What a token stands for, from the file's vocabulary; None where it has none."""
        self._check_open()
        return token_text(self.file.metadata, token)

    def new_cache(self, max_tokens: int) -> Cache:
        """A key/value cache with room for max_tokens, to cut one prompt into several calls. Raises InputError."""
        self._check_open()
        self._check_causal()
        if not 0 < max_tokens <= self.config.context_length:
            raise InputError(
                f"a cache of {max_tokens} tokens: 1 to the context length {self.config.context_length} are possible"
            )
        cache = self.backend.new_cache(self.family, max_tokens)
        self._caches.append(cache)
        return cache

    def drop_cache(self, cache: Cache) -> None:
        """Free a cache of this model's."""
        self._caches = [own for own in self._caches if own is not cache]
        cache.close()

    def close(self) -> None:
        """Free the weights, the caches and the device's memory, and unmap the file. Twice is harmless."""
        self._closed = True
        if self._last_chat is not None:
            self._last_chat.close()
        for cache in self._caches:
            cache.close()
        self._caches.clear()
        self.backend.close()
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chat(self, template: str | None) -> Chat:
        """The Chat of a template, None: the file's own; the last one is kept."""
        if self._last_chat is None or self._last_template != template:
            from ..text.chat import Chat

            if self._last_chat is not None:
                self._last_chat.close()
            self._last_chat = Chat(self.tokenizer(), self.file.metadata, self.file.path, template)
            self._last_template = template
        return self._last_chat

    def _check_tokens(self, tokens: Any) -> Int32Array:
        return token_ids(tokens, self.config.vocab_size)

    def _check_causal(self) -> None:
        if self.family.both_ways:
            raise ModelError(f"{self.file.path}: tokens see those after them: it gives vectors (embed), no next token")

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"the model {self.file.path} has been closed; open it again with kqprefill.load")

    def _check_room(self, start: int, n: int, cache: Cache | None) -> None:
        limit = self.config.context_length
        if start + n > limit:
            already = f" after {start} cached" if start else ""
            raise InputError(f"a prompt of {n} tokens{already} is past the model's context length of {limit}")
        if cache is None:
            return
        cache.check()
        if start + n > cache.capacity:
            raise InputError(f"the cache has room for {cache.capacity - start} more tokens, but the prompt has {n}")


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: Devices = 0,
    kernels: str = "auto",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    vram: Budget | str | int | None = None,
    max_tokens: int | None = None,
    precision: str = "exact",
) -> Model:
    """`kqprefill.load`, which says what the arguments are."""
    return open_model(GGUFFile(path), backend, device, kernels, progress, warn, vram, max_tokens, False, precision)


@np.errstate(all="ignore")
def open_model(
    file: ModelFile,
    backend: str = "auto",
    device: Devices = 0,
    kernels: str = "auto",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    vram: Budget | str | int | None = None,
    max_tokens: int | None = None,
    ranks: bool = False,
    precision: str = "exact",
) -> Model:
    """`load`, for a file that is open already (a GGUFFile or a SyntheticFile); closes it on failure.

    ranks: max_tokens is of the largest batch that `score` will make, None where the backend is to choose it.
    """
    start = time.perf_counter()
    opened: Backend | None = None
    try:
        budget = None if vram is None else Budget.parse(vram)
        how = precision_called(precision)
        family = read_model(file)
        opened = open_backend(backend, device, kernels, warn or _warn)
        if how == "int8" and not any(takes_int8(weight) for weight in family.matrices()):
            (warn or _warn)("--precision int8 changes nothing: it leaves the first layer and float formats as they are")
        opened.load(family, progress or no_progress, budget, max_tokens, ranks, how)
    except BaseException:
        if opened is not None:
            opened.close()
        file.close()
        raise
    model = Model(file, family, opened, {"load": time.perf_counter() - start}, how)
    _log_loaded(model)
    return model


def _log_loaded(model: Model) -> None:
    backend, where = model.backend, f"{model.precision} on {model.backend.name} ({model.backend.device_name})"
    _LOG.info("%s loaded in %.2f s, %s", shown(model.file.path), model.timings["load"], where)
    for plan in backend.plans:
        _LOG.info("GPU memory: %d of %d bytes that may be taken", plan.nbytes, plan.budget)
        _LOG.info("layers: %d stay, %d are streamed", len(plan.resident), len(plan.streamed))


def _warn(line: str) -> None:
    """To whoever listens to the logger "kqprefill", else to stderr."""
    if _LOG.hasHandlers():
        _LOG.warning("%s", line)
    else:
        print(f"kqprefill: {line}", file=sys.stderr)
