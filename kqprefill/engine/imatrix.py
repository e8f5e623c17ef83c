"""Importance matrices of a text, over the chunks that llama-imatrix (llama.cpp) cuts it into, so that they compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
import hashlib
import json
import os
import struct
import tokenize
from typing import TYPE_CHECKING, BinaryIO
from zipfile import BadZipFile
import zlib

import numpy as np

from ..collector import Collector, Squares
from ..core import Batch, Int32Array, PendingHead, Progress, Segment, no_progress
from ..errors import DAMAGED_WEIGHTS, BackendError, InputError
from .checks import token_ids
from .imatrix_file import ImportanceMatrix

if TYPE_CHECKING:
    from .model import Model

CONTEXT = 512  # llama-imatrix's
_VERSION = 1  # of checkpoints
# What np.load and json raise for bytes that are none of theirs: a file of another kind, cut short, or damaged.
_DAMAGED: tuple[type[Exception], ...] = (
    *(ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, SyntaxError),
    *(BadZipFile, struct.error, tokenize.TokenError, zlib.error),
)


@dataclass(frozen=True)
class Progressed:
    """What has been summed over the first `chunks` chunks of a text.

    squares: by the names of the tensors that share them. key: tells texts, and ways to cut them, apart. precision: of
    the model that it was summed with.
    """

    chunks: int
    squares: Mapping[tuple[str, ...], Squares]
    key: str
    precision: str = "exact"

    def matrix(self, context: int, dataset: str) -> ImportanceMatrix:
        """As an ImportanceMatrix of a text of that name."""
        entries = {name: squares for names, squares in self.squares.items() for name in names}
        return ImportanceMatrix(entries, context, (dataset,))

    def write(self, file: BinaryIO) -> None:
        """Write a checkpoint, of which `read_checkpoint` makes the same again."""
        names = list(self.squares)
        own = {"chunks": self.chunks, "key": self.key, "precision": self.precision, "names": names}
        about = json.dumps({"version": _VERSION, **own})
        sums = (array for squares in self.squares.values() for array in (squares.sums, squares.counts))
        np.savez(file, np.frombuffer(about.encode(), np.uint8), *sums)  # as arr_0, arr_1, …


def read_checkpoint(path: str | os.PathLike[str]) -> Progressed:
    """What `Progressed.write` has written. Raises InputError where the file is something else."""
    try:
        with np.load(path) as arrays:
            about = json.loads(arrays["arr_0"].tobytes())
            if about["version"] != _VERSION:
                raise InputError(f"{os.fspath(path)}: a checkpoint of another version; --force begins anew")
            squares = {
                tuple(map(str, names)): Squares(
                    arrays[f"arr_{2 * number + 1}"].astype(np.float64),
                    arrays[f"arr_{2 * number + 2}"].astype(np.int64),
                )
                for number, names in enumerate(about["names"])
            }
            precision = str(about.get("precision", "exact"))
            return Progressed(int(about["chunks"]), squares, str(about["key"]), precision)
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: {error.strerror or error}") from None
    except _DAMAGED:
        raise InputError(f"{os.fspath(path)}: not a checkpoint of an importance matrix; --force begins anew") from None


def importance_matrix(
    model: Model,
    tokens: Sequence[int],
    context: int = CONTEXT,
    first: int = 0,
    most: int | None = None,
    bos: int | None = None,
    output: bool = False,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    resumed: Progressed | None = None,
    on_chunks: Callable[[int, Callable[[], Progressed]], None] | None = None,
    stops: int | None = None,
) -> Progressed:
    """Sum the squares of what goes into the products of an open Model, over token ids [T].

    Chunks of `context` tokens follow one another, each a sequence of its own; the first `first` are skipped, at most
    `most` are taken, and what is left over is left out (llama.cpp, tools/imatrix: `compute_imatrix`). bos: what each
    chunk's first token is replaced by (files that ask for BOS), or None. output: whether the output matrix's input
    counts, too. batch_tokens: of a batch of several chunks, as in `Model.score`. progress("chunks", done, total) hears
    how far it is, in layers of chunks. resumed: what an earlier run over the same tokens has summed, which is gone on
    from. on_chunks(done, so_far): called after each batch; so_far() waits, and gives what was summed up to there.
    stops: batches end at multiples of so many chunks.

    Raises InputError where a chunk does not fit the model, the text does not fill one, or `resumed` is of another text
    or precision; BackendError where a sum is not finite.
    """
    model._check_open()
    if not 1 <= context <= model.config.context_length:
        raise InputError(f"a context of {context} tokens: 1 to the model's {model.config.context_length} are possible")
    ids = token_ids(tokens, model.config.vocab_size)[first * context :]
    count = min(len(ids) // context, most or len(ids))
    if not count:
        skipped = f" after {first} chunks that are skipped" if first else ""
        raise InputError(
            f"the text has {len(ids)} tokens{skipped}, but a chunk takes {context}: give a longer text, or a smaller "
            "context"
        )
    chunks = ids[: count * context].reshape(count, context).copy()
    if bos is not None:
        chunks[:, 0] = bos
    key = _key(model, chunks, output)
    if resumed is not None and resumed.key != key:
        raise InputError("the checkpoint is of another model, text, context or choice of chunks; --force begins anew")
    if resumed is not None and resumed.precision != model.precision:
        raise InputError(
            f"the checkpoint was begun at precision {resumed.precision}, and this is {model.precision}: give "
            f"--precision {resumed.precision}, or --force begins anew"
        )
    done = resumed.chunks if resumed is not None else 0
    collector = model.backend.new_collector(model.family, output, progress or no_progress)
    try:
        return _Run(model, chunks, key, collector, resumed, progress).through(done, batch_tokens, on_chunks, stops)
    finally:
        collector.close()


def _key(model: Model, chunks: Int32Array, output: bool) -> str:
    """Tells runs apart: the model's tensors (of the norms and other vectors the values, too), the chunks' tokens, and
    what is summed."""
    digest = hashlib.sha256(chunks.tobytes())
    tensors = [(name, list(t.shape), t.type.name) for name, t in sorted(model.file.tensors.items())]
    digest.update(json.dumps([chunks.shape, output, tensors]).encode())
    for weight in (model.family.output_norm, *(w for block in model.family.blocks for w in block)):
        if not weight.is_matrix:
            digest.update(weight.tensor.data.tobytes())
    return digest.hexdigest()


@dataclass
class _Run:
    """A collector's way through chunks [count, context]."""

    model: Model
    chunks: Int32Array
    key: str
    collector: Collector
    resumed: Progressed | None
    progress: Progress | None

    def through(
        self,
        done: int,
        batch_tokens: int | None,
        on_chunks: Callable[[int, Callable[[], Progressed]], None] | None,
        stops: int | None,
    ) -> Progressed:
        """What all chunks from number `done` on add up to, with those before."""
        model, (count, context) = self.model, self.chunks.shape
        size = model.backend.batch_size(model.family, batch_tokens, 0, self.progress or no_progress)
        at_once, running = max(1, size.tokens // context), deque[PendingHead]()
        while done < count:
            end = min(count, done + at_once)
            if stops is not None:
                end = min(end, done - done % stops + stops)
            running.append(self._start(done, end))
            while len(running) > model.backend.ahead:
                running.popleft()()
            done = end
            if on_chunks is not None:
                on_chunks(done, lambda done=done: self._so_far(done))  # type: ignore[misc]
        for pending in running:
            pending()
        return self._so_far(done)

    @np.errstate(all="ignore")  # what overflows is told by its sum
    def _start(self, begin: int, end: int) -> PendingHead:
        """Have a batch of these chunks computed."""
        model, (count, context) = self.model, self.chunks.shape
        segments = tuple(Segment(i * context, context) for i in range(end - begin))
        batch = Batch(self.chunks[begin:end].ravel(), segments=segments)

        def hear(stage: str, layers: int, of: int) -> None:
            assert self.progress is not None
            if stage == "prefill":
                stage, layers, of = "chunks", begin * of + (end - begin) * layers, count * of
            self.progress(stage, layers, of)

        heard = no_progress if self.progress is None else hear
        pending, _ = model.backend.run(model.family, batch, None, None, heard, collector=self.collector)
        return pending

    def _so_far(self, done: int) -> Progressed:
        squares = {
            names: Squares(own.sums.copy(), own.counts.copy()) for names, own in self.collector.squares().items()
        }
        for names, own in squares.items():
            if not np.isfinite(own.sums).all():
                raise BackendError(f"what goes into {names[0]} is not finite: {DAMAGED_WEIGHTS}")
        for names, before in (self.resumed.squares if self.resumed is not None else {}).items():
            squares[names] = before + squares[names] if names in squares else before
        return Progressed(done, squares, self.key, self.model.precision)
