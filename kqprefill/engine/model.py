"""The library's front: a model opened on a backend, and the layer-major schedule of one prefill."""

from dataclasses import dataclass, field
import sys
import time

import numpy as np

from ..backends import open_backend
from ..backends.base import Batch
from ..backends.budget import Budget
from ..errors import InputError
from ..gguf import GGUFFile
from ..gguf.vocabulary import token_text
from ..models import read_model
from .scoring import BATCH_TOKENS, Item, groups, item_of, lay_out, no_ranks, results

_LOGITS = (None, "last", "all")


@dataclass(frozen=True)
class Prefill:
    """What a prefill gives.

    token: the greedy next token's id, None for an empty prompt; logit and logprob (natural logarithm) are its own.
    logits: float32 [V] for "last", [T, V] for "all", else None. timings: {"prefill": seconds}. stages: {name: Stage}
    (kqprefill.backends.timeline) where asked for, else None.
    """

    token: int | None
    logit: float | None
    logprob: float | None
    logits: np.ndarray | None
    prompt_tokens: int
    timings: dict = field(default_factory=dict)
    stages: dict | None = None

    def likeliest(self, count):
        """[(token, natural log-probability)] of the likeliest next tokens, the lowest ids of equals first; needs logits."""
        last = self.logits[-1] if self.logits.ndim == 2 else self.logits
        order = np.argsort(-last, kind="stable")[:count]
        shifted = last.astype(np.float64) - float(last[order[0]])
        return [(int(token), float(shifted[token] - np.log(np.exp(shifted).sum()))) for token in order]


class Model:
    """A model ready to prefill; a context manager, freed by `close`. Made by `kqprefill.load`."""

    def __init__(self, file, family, backend, timings):
        self.file, self.family, self.backend, self.timings = file, family, backend, timings
        self._caches, self._tokenizer = [], None

    @property
    def config(self):
        """Sizes and constants (kqprefill.models.config.Config)."""
        return self.family.config

    def prefill(self, tokens, logits=None, cache=None, progress=None, timed=False):
        """Run the prompt and give its greedy next token (Prefill).

        tokens: ids, any integer sequence [T]; an empty one is a no-op. logits: which to return, None, "last" or "all".
        cache: a cache of this model's `new_cache`; the prompt continues at cache.length, which grows by T.
        progress(stage, done, total) hears of compiling and of each layer. timed: also measure each stage, which costs a
        little and, on a GPU, launches kernels one by one. Raises InputError for bad ids, a prompt past
        the context length or past the cache's room; BackendError where the device fails or a logit is NaN.
        """
        start_time = time.perf_counter()
        progress = progress or (lambda *_: None)
        if logits not in _LOGITS:
            raise InputError(f"logits={logits!r} is unknown; choose None, 'last' or 'all'")
        tokens = self._check_tokens(tokens)
        start = 0 if cache is None else cache.length
        if len(tokens) == 0:
            empty = np.empty((0, self.config.vocab_size), np.float32) if logits == "all" else None
            return Prefill(None, None, None, empty, 0, {"prefill": 0.0})
        self._check_room(start, len(tokens), cache)
        head, stages = self._run(Batch(tokens, start), cache, logits, progress, timed)
        if cache is not None:
            cache.length = start + len(tokens)
        elapsed = time.perf_counter() - start_time
        timings = {"prefill": elapsed}
        return Prefill(head.token, head.logit, head.logprob, head.logits, len(tokens), timings, stages)

    def _run(self, batch, cache, logits, progress, timed=False):
        family = self.family

        def forward(ops):  # layer by layer over the whole batch: each weight is visited once
            x = family.embed(ops, batch.tokens)
            for index, weights in enumerate(family.blocks):
                ops.begin_layer(index)
                x = family.layer(ops, weights, x, index)
                progress("prefill", index + 1, len(family.blocks))
            return x

        return self.backend.run(family, batch, cache, logits, forward, progress, timed)

    def score(self, records, batch_tokens=BATCH_TOKENS, top=0):
        """The log-probabilities of many prompts, packed into batches: a generator of a Scored (kqprefill.engine.scoring) for
        each record, or of a list of them where it has "choices".

        records: each a sequence of token ids, whose tokens but the first are scored; or a mapping with "tokens" (ids) or "prompt"
        (text), and perhaps "completion" or "choices" (one or several continuations of the same kind, scored given the prompt); or
        an Item of `item`. None among them has all before it computed at once, rather than wait for a full batch. batch_tokens:
        of a batch, at most, but for one longer prompt. top: how many likeliest tokens to name at each place. Logits stay on
        the device; results are the same however records are packed. Raises InputError for a bad record; BackendError.
        """
        if batch_tokens < 1 or not 0 <= top <= self.config.vocab_size:
            raise InputError(
                f"batch_tokens {batch_tokens} and top {top}: at least 1, and 0 to the vocabulary's {self.config.vocab_size}"
            )
        items = (r if r is None or isinstance(r, Item) else self.item(r) for r in records)
        running, found = None, []
        for group in groups(items, batch_tokens):
            started = None if group is None else self._start(group, top)
            if running is not None:  # while the next batch runs
                yield from _finished(*running, found)
            running = started
        if running is not None:
            yield from _finished(*running, found)

    def item(self, record):
        """A record, checked and tokenised (`score`). Raises InputError."""
        item = item_of(record, lambda ids: self._check_tokens(ids).tolist(), self.tokenize)
        self._check_room(0, item.longest, None)
        return item

    def _start(self, group, top):
        batch, places = lay_out([piece for piece, _ in group], top)
        wait = lambda: no_ranks(top)  # noqa: E731
        if len(batch.targets.rows):
            wait, _ = self._run(batch, None, "ranks", lambda *_: None)
        return group, batch, places, wait

    def tokenize(self, text, add_special=True):
        """A text's token ids (list), by the file's own tokenizer; add_special: with the BOS and EOS that the file asks for.

        Raises ModelError where the file has no vocabulary of a supported kind, InputError where the `tokenizers` library, which
        byte-level BPE needs, is missing or the text is not valid Unicode.
        """
        if self._tokenizer is None:
            from ..text import Tokenizer

            self._tokenizer = Tokenizer(self.file.metadata, self.file.path)
        return self._tokenizer.encode(text, add_special)

    def token_text(self, token):
        """What a token stands for, from the file's vocabulary; None where it has none."""
        return token_text(self.file.metadata, token)

    def new_cache(self, max_tokens):
        """A key/value cache with room for max_tokens, to cut one prompt into several calls. Raises InputError."""
        if not 0 < max_tokens <= self.config.context_length:
            raise InputError(
                f"a cache of {max_tokens} tokens: 1 to the context length {self.config.context_length} are possible"
            )
        cache = self.backend.new_cache(self.family, max_tokens)
        self._caches.append(cache)
        return cache

    def close(self):
        """Free the weights, the caches and the device's memory, and unmap the file. Twice is harmless."""
        for cache in self._caches:
            cache.close()
        self._caches.clear()
        self.backend.close()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _check_tokens(self, tokens):
        try:
            array = np.asarray(tokens)
        except ValueError:  # rows of differing lengths
            raise InputError("tokens must be a flat sequence of integers") from None
        if array.size == 0:
            return np.empty(0, np.int32)
        beyond_64_bits = array.dtype == object and array.ndim == 1 and all(type(token) is int for token in array)
        if array.ndim != 1 or array.dtype.kind not in "iu" and not beyond_64_bits:
            raise InputError(
                f"tokens must be a flat sequence of integers, not {array.dtype} of shape {list(array.shape)}"
            )
        bad = ((array < 0) | (array >= self.config.vocab_size)).astype(bool)
        if bad.any():
            at = int(bad.argmax())
            raise InputError(
                f"token {array[at]} at position {at} is not in the vocabulary (0 to {self.config.vocab_size - 1})"
            )
        return array.astype(np.int32)

    def _check_room(self, start, n, cache):
        limit = self.config.context_length
        if start + n > limit:
            already = f" after {start} cached" if start else ""
            raise InputError(f"a prompt of {n} tokens{already} is past the model's context length of {limit}")
        if cache is not None and start + n > cache.capacity:
            raise InputError(f"the cache has room for {cache.capacity - start} more tokens, but the prompt has {n}")


def _finished(group, batch, places, wait, found):
    """The results of a batch's items that are complete; found: of the one that is not."""
    for (piece, last), scored in zip(group, results(batch, places, wait())):
        found += scored
        if last:
            yield list(found) if piece.choices else found[0]
            found.clear()


def load(path, backend="auto", device=0, kernels="auto", progress=None, warn=None, vram=None, max_tokens=None):
    """Open the GGUF model at path.

    backend: "auto" (CUDA where usable, else the CPU, said in one line on stderr), "cuda" or "cpu". device: the CUDA
    device's number. kernels: "auto", or "portable" for the kernels of every GPU on one that has its own.
    vram: the GPU memory that may be taken, all told: bytes, "8G" or "75%"; None for all that is free. Layers that have no
    room in it are streamed from the file for each prompt, with the same results. max_tokens: the longest prompt to keep
    room for (a longer one makes layers leave). progress(stage, done, total) hears of loading; warn(line) hears why "auto" took the CPU (stderr unless given).
    Raises GGUFError (a bad file), ModelError (a model that is not supported), BackendError (no usable GPU, or not
    enough memory), InputError (a bad argument).
    """
    return open_model(GGUFFile(path), backend, device, kernels, progress, warn, vram, max_tokens)


def open_model(
    file,
    backend="auto",
    device=0,
    kernels="auto",
    progress=None,
    warn=None,
    vram=None,
    max_tokens=None,
    ranks=False,
):
    """`load`, for a file that is open already (a GGUFFile or a SyntheticFile); closes it on failure. ranks: max_tokens is of the
    largest batch that `score` will make."""
    start = time.perf_counter()
    opened = None
    try:
        budget = None if vram is None else Budget.parse(vram)
        family = read_model(file)
        warn = warn or (lambda line: print(f"kqprefill: {line}", file=sys.stderr))
        opened = open_backend(backend, device, kernels, warn)
        opened.load(family, progress or (lambda *_: None), budget, max_tokens, ranks)
    except BaseException:
        if opened is not None:
            opened.close()
        file.close()
        raise
    return Model(file, family, opened, {"load": time.perf_counter() - start})
