"""A long text cut into windows as llama-perplexity (llama.cpp) cuts it, and the logits of their second halves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from ..backends.budget import free_host_memory
from ..core import Batch, Brief, Float32Array, HeadResult, Int32Array, Progress, Segment, Targets, no_progress
from ..errors import DAMAGED_WEIGHTS, BackendError, InputError
from .checks import first_non_finite_row, token_ids

if TYPE_CHECKING:
    from .model import Model

CONTEXT = 512  # llama-perplexity's
_LOGITS_BYTES = 1 << 30  # of a batch's logits in host memory, where nothing is gained by larger batches


@dataclass(frozen=True, repr=False)
class Windows(Brief):
    """Windows of a text, int32 [N, context], which follow one another.

    Of each the second half is scored: `scored` tokens, from number `first` of the window on, each given all before it
    in the window (llama.cpp, tools/perplexity: `perplexity`). bos: what a window's first token is replaced by when it
    is run, or None.
    """

    tokens: Int32Array
    bos: int | None = None

    @classmethod
    def of(
        cls, ids: Iterable[int], context: int, most: int | None, bos: int | None, models: Sequence[Model]
    ) -> Windows:
        """The windows of token ids [T], at most `most` of them; what is left over is left out.

        Raises InputError where a window does not fit one of the models, where the text does not fill one, or where an
        id is not in their vocabulary.
        """
        longest = min(model.config.context_length for model in models)
        if not 4 <= context <= longest:
            raise InputError(f"a context of {context} tokens: 4 to the model's {longest} are possible")
        all_ids = list(ids)
        count = len(all_ids) // context
        if not count:
            raise InputError(
                f"the text has {len(all_ids)} tokens, but one window takes {context}: give a longer text, or a smaller "
                "context"
            )
        count = min(count, most or count)
        used = token_ids(all_ids[: count * context], min(model.config.vocab_size for model in models))
        return cls(used.reshape(count, context), bos)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """The place in a window of the first token that is scored."""
        return self.context // 2 + 1

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.context - self.first

    def targets(self, part: slice = slice(None)) -> Int32Array:
        """The tokens that are scored, of some of the windows: int32 [n * scored]."""
        return self.tokens[part, self.first :].reshape(-1)

    def window(self, index: int) -> list[int]:
        """A window's tokens as they are run."""
        own: list[int] = self.tokens[index].tolist()
        return own if self.bos is None else [self.bos, *own[1:]]


def batches_of(windows: Windows, models: Sequence[Model], batch_tokens: int | None) -> list[slice]:
    """Which windows go into each batch: about as many into each.

    batch_tokens: of a batch, at most, but for one window; None for what the models' backends choose. All models' logits
    of a batch are in host memory at a time: they take at most a quarter of what is free, and at most 1 GiB where no
    layers are streamed, which alone asks for larger batches.
    """
    tokens = min(model.backend.batch_size(model.family, batch_tokens).tokens for model in models)
    room = free_host_memory() // 4
    if not any(plan.streamed for model in models for plan in model.backend.plans):
        room = min(room, _LOGITS_BYTES)
    nbytes = sum(4 * windows.scored * model.config.vocab_size for model in models)
    most = max(1, min(tokens // (windows.context - 1), room // nbytes))
    count = -(-len(windows) // most)
    return [slice(*part) for part in pairwise(-(-len(windows) * i // count) for i in range(count + 1))]


@np.errstate(all="ignore")
def window_logits(model: Model, windows: Windows, part: slice, progress: Progress = no_progress) -> Float32Array:
    """The logits that the scored tokens of some windows were predicted by, in one batch: float32 [n * scored, V].

    progress(stage, done, total) hears of compiling and of each layer. Raises BackendError where the device fails, or
    where a logit is not finite: it names the token of the text.
    """
    length = windows.context - 1  # what the last token predicts is not asked
    ids = np.array([windows.window(i)[:-1] for i in range(*part.indices(len(windows)))], np.int32)
    starts = range(0, ids.size, length)
    rows = np.concatenate([np.arange(at + windows.first - 1, at + length, dtype=np.int32) for at in starts])
    segments = tuple(Segment(at, length) for at in starts)
    batch = Batch(ids.reshape(-1), segments=segments, targets=Targets(rows, windows.targets(part)))
    pending, _ = model.backend.run(model.family, batch, None, "rows", progress)
    logits = cast(HeadResult, pending()).logits
    assert logits is not None, "the logits of rows were asked for"
    bad = first_non_finite_row(logits)
    if bad is not None:
        raise not_finite(windows, (part.start or 0) * windows.scored + bad)
    return logits


def not_finite(windows: Windows, number: int) -> BackendError:
    """The error where a scored token, by its number among all of the windows', has a log-probability or a logit that is
    not finite."""
    window, place = divmod(number, windows.scored)
    at = window * windows.context + windows.first + place
    return BackendError(f"the log-probability of token {at} of the text is not finite: {DAMAGED_WEIGHTS}")


def heard(progress: Progress | None, total: int, taken: int, n: int, run: int = 0, runs: int = 1) -> Progress:
    """A Progress for a batch's layers that tells `progress` of "windows".

    total: windows of all; taken: of the batches before; n: of this one; run, runs: which of how many models runs it.
    """

    def hear(stage: str, layers: int, of: int) -> None:
        if stage == "prefill":
            stage, layers, of = "windows", taken * of * runs + n * (run * of + layers), total * of * runs
        if progress is not None:
            progress(stage, layers, of)

    return hear
