"""The file of log-probabilities that llama-perplexity writes for `--kl-divergence-base`: a text's windows, and what a
model says after each token of their second halves.

The layout (llama.cpp, tools/perplexity/perplexity.cpp), little-endian: `_logits_`, int32 context, vocabulary and
windows, int32 tokens [windows, context] without a BOS in place of the first; then for each scored token a row of
uint16: two float32, scale and minimum, in the first four; V numbers q, and one more where V is odd. ln p = scale * q +
minimum: what is 16 nats or more below the likeliest token is told as such.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..core import Float32Array, Int32Array, Progress
from ..errors import KqprefillError
from .perplexity import Perplexity, perplexity_of
from .rows import by_rows, largest_and_sum
from .windows import Windows, batches_of, heard, window_logits

if TYPE_CHECKING:
    from .model import Model

UInt16Array: TypeAlias = NDArray[np.uint16]

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8s3i")
_SCALES = 4  # words of a row before its numbers
_RANGE = np.float32(16)  # nats that the numbers span
_STEPS = np.float32(65535)


def file_size(windows: Windows, vocab_size: int) -> int:
    """Bytes of the file of these windows."""
    rows = len(windows) * windows.scored
    return _HEADER.size + windows.tokens.nbytes + 2 * rows * _row_words(vocab_size)


def save_logits(
    model: Model, windows: Windows, file: BinaryIO, batch_tokens: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Write what an open Model says of windows into a binary file, and give their Perplexity.

    batch_tokens, progress: as for `perplexity`. Raises BackendError where the device fails or a logit is not finite.
    """
    vocab_size, surprisals = model.config.vocab_size, []
    file.write(_HEADER.pack(_MAGIC, windows.context, vocab_size, len(windows)))
    file.write(windows.tokens.astype("<i4").tobytes())
    for part in batches_of(windows, [model], batch_tokens):
        hear = heard(progress, len(windows), part.start, part.stop - part.start)
        logits = window_logits(model, windows, part, hear)
        for packed, surprisal in _packed(logits, windows.targets(part)):
            file.write(packed.data)
            surprisals.append(surprisal)
    return perplexity_of(np.concatenate(surprisals), len(windows))


class LogitsFile:
    """Such a file, open. path: its name; tokens: int32 [windows, context]; vocab_size: V."""

    def __init__(self, path: str) -> None:
        """Raises KqprefillError where the file cannot be read, is none of these or was cut short."""
        self.path = path
        try:
            with open(path, "rb") as file:
                head, found = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
                if len(head) < _HEADER.size or not head.startswith(_MAGIC):
                    raise KqprefillError(
                        f"{path}: no file of log-probabilities; `kqprefill perplexity --save-logits` writes one, or "
                        "llama-perplexity --kl-divergence-base"
                    )
                _, context, self.vocab_size, count = _HEADER.unpack(head)
                if context < 4 or self.vocab_size < 1 or count < 1:
                    raise KqprefillError(
                        f"{path}: its header says {count} windows of {context} tokens and a vocabulary of "
                        f"{self.vocab_size}: it is damaged"
                    )
                row_words, scored = _row_words(self.vocab_size), context - 1 - context // 2
                at = _HEADER.size + 4 * count * context
                expected = at + 2 * count * scored * row_words
                if found != expected:
                    what = "it was cut short" if found < expected else "it is damaged"
                    raise KqprefillError(f"{path}: {found} bytes, where its header makes {expected}: {what}")
                self.tokens: Int32Array = np.fromfile(file, "<i4", count * context).reshape(count, context)
            shape = (count * scored, row_words)
            self._rows: UInt16Array = np.memmap(path, "<u2", "r", at, shape)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise KqprefillError(f"{path}: {reason}") from None

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    def rows(self, part: slice) -> tuple[Float32Array, Float32Array, UInt16Array]:
        """Scale and minimum, float32 [n, 1] each, and the numbers, uint16 [n, V], of scored tokens.

        Raises KqprefillError where a scale or a minimum is not finite.
        """
        words = np.ascontiguousarray(self._rows[part])
        scales = words[:, :_SCALES].copy().view("<f4")
        if not np.isfinite(scales).all():
            raise KqprefillError(f"{self.path}: a scale among its log-probabilities is not finite: it is damaged")
        return scales[:, :1], scales[:, 1:2], words[:, _SCALES : _SCALES + self.vocab_size]


def _row_words(vocab_size: int) -> int:
    return _SCALES + vocab_size + vocab_size % 2


def _packed(logits: Float32Array, targets: Int32Array) -> list[tuple[UInt16Array, NDArray[np.float64]]]:
    """Rows of the file for logits [n, V], in some parts, and the surprisals in nats of the tokens [n] that came."""
    return by_rows(lambda part: _pack(logits[part], targets[part]), *logits.shape)


def _pack(logits: Float32Array, targets: Int32Array) -> tuple[UInt16Array, NDArray[np.float64]]:
    """All in float32, as llama.cpp does it, so that the numbers are the same."""
    largest, total = largest_and_sum(logits)
    log_total = np.log(total)
    smallest = np.maximum(logits.min(axis=-1), largest - _RANGE)
    scale = (largest - smallest) / _STEPS
    words = np.zeros((len(logits), _row_words(logits.shape[1])), "<u2")
    scales = np.stack([scale, smallest - largest - log_total.astype(np.float32)], axis=-1).astype("<f4")
    words[:, :_SCALES] = scales.view("<u2")
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of equal logits has no scale: its numbers are 0
        steps = np.rint((np.float32(1) / scale)[:, None] * (logits - smallest[:, None]))
    above = (logits > smallest[:, None]) & (scale > 0)[:, None]
    words[:, _SCALES : _SCALES + logits.shape[1]] = np.where(above, steps, 0)
    chosen = logits[np.arange(len(logits)), targets].astype(np.float64)
    return words, largest + log_total - chosen
