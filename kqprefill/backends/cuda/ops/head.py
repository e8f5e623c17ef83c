"""The end of a batch: logits, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any

import numpy as np

from ....core import NO_RESULT, Float32Array, HeadResult, Logits, PendingHead, Ranks, Vectors
from ....models.weights import Weight
from ..constants import THREADS
from ..device.arrays import FLOAT32, DeviceArray
from ..programs import HEAD, NORM
from .batch import Residual
from .dense import DenseOps

_LOGITS_BYTES = 320 << 20  # of logits on the device at a time
_WHOLE_TILES = 256  # positions whose logits are made at a time are a multiple of this, where there is room for so many
RANKED = np.dtype([("token", np.int32), ("logit", np.float32), ("logprob", np.float32)])  # head.cu's Ranked


class HeadOps(DenseOps):
    """Part of CudaOps."""

    def head(
        self,
        x: Residual,
        norm: Weight,
        output: Weight,
        logits: Logits,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> PendingHead:
        if self.collector is not None:
            if self.collector.wants(output.name):
                self.hear([output], self.normalise(x.values, norm))
            self._prefetch()
            return lambda: NO_RESULT
        count, targets = self.batch.count(logits), self.batch.targets
        self.enter("head", [output], count)
        matrix, first = self.matrix(output), self.n - count
        most = self._rows_at_once(matrix.rows, count)
        device = self.work.array("logits", FLOAT32, most, matrix.rows)
        asked = targets if logits == "ranks" else None
        top = max(1, min(matrix.rows, asked.top)) if asked is not None else 1
        ranked = np.empty((count if asked is not None else 1, top + 1), RANKED)
        on_device = self.work.array("ranked", RANKED, *ranked.shape)
        kept = np.empty((count, matrix.rows), np.float32) if logits in ("all", "last", "rows") else None
        for at in range(0, count, most):
            end = min(at + most, count)
            if logits in ("ranks", "rows"):
                h = self.normalise(x.values, norm, picked=self.target_rows.rows(at, end))
            else:
                h = self.normalise(x.values.rows(first + at, first + end), norm)
            rows = device.rows(0, end - at)
            self.multiply(h, [matrix], rows, self.bias(output))
            self._finish(rows, scale, softcap)
            if asked is not None:
                self._rank(rows, self.target_tokens.rows(at, end), top, on_device.rows(at, end))
            elif end == count:
                self._rank(rows.rows(end - at - 1), None, top, on_device)
            if kept is not None:
                self.context.gpu.download(kept[at:end], rows.address)
        self._prefetch()
        wait = self.context.downloads.start(ranked, on_device)
        if asked is not None:
            return lambda: _ranks(wait, ranked, asked.top)
        return lambda: self._last(wait, ranked, kept[0] if logits == "last" and kept is not None else kept)

    def pool(self, x: Residual, norm: Weight) -> PendingHead:
        self.enter("head")
        rows = self.work.upload("pooled rows", self.batch.pooled_rows)
        factors = self.work.array("row factors", FLOAT32, self.n)
        columns, count = norm.shape[0], rows.shape[0]
        self.launcher.launch(
            NORM,
            "row_factors",
            grid=self.n,
            x=x.values,
            columns=columns,
            epsilon=self.config.norm_epsilon,
            factors=factors,
        )
        on_device = self.work.array("vectors", FLOAT32, count, columns)
        self.launcher.launch(
            NORM,
            "pool",
            grid=(count, -(-columns // THREADS["pool"])),
            x=x.values,
            factors=factors,
            weight=self.vector(norm),
            rows=rows,
            columns=columns,
            vectors=on_device,
        )
        if self.context.weights.streaming:
            self.context.weights.prefetch()  # the next batch's first layers
        values = np.empty((count, columns), np.float32)
        wait = self.context.downloads.start(values, on_device)

        def vectors() -> Vectors:
            wait()
            return Vectors(values)

        return vectors

    def _prefetch(self) -> None:
        """Launch the copies of the next batch's first layers."""
        if self.context.weights.streaming:
            self.context.weights.prefetch()

    def _finish(self, rows: DeviceArray, scale: float, softcap: float | None) -> None:
        """Scale and cap logits, where the family does."""
        if scale != 1.0 or softcap is not None:
            n = rows.shape[0] * rows.shape[1]
            grid = -(-n // THREADS["finish_logits"])
            self.launcher.launch(
                HEAD, "finish_logits", grid=grid, logits=rows, n=n, scale=scale, softcap=softcap or 0.0
            )

    def _rank(self, rows: DeviceArray, targets: DeviceArray | None, top: int, out: DeviceArray) -> None:
        """What is told of each of these rows of logits."""
        count, vocab = rows.shape
        self.launcher.launch(HEAD, "rank", grid=count, logits=rows, n=vocab, targets=targets, top=top, out=out)

    def _last(
        self, wait: Callable[[], None], ranked: np.ndarray[Any, np.dtype[np.void]], logits: Float32Array | None
    ) -> HeadResult:
        """Wait for what is told of the last position, and until a cache has the batch."""
        wait()
        self.states.end_batch(self.batch.start, len(self.batch.tokens))
        token, logit, logprob = ranked[0, 1].item()
        if token < 0:  # a logit is NaN
            logit = logprob = nan
        return HeadResult(token, logit, logprob, logits)

    @staticmethod
    def _rows_at_once(vocab: int, count: int) -> int:
        """Positions whose logits are made at a time: whole tiles of a GEMM, where there is room for one."""
        most = _LOGITS_BYTES // (4 * vocab)
        return max(1, min(count, most // _WHOLE_TILES * _WHOLE_TILES or most))


def _ranks(wait: Callable[[], None], ranked: np.ndarray[Any, np.dtype[np.void]], top: int) -> Ranks:
    """Ranks of rank's output, [S, 1 + at least top], once it has come."""
    wait()
    likeliest = ranked[:, 1 : 1 + top]
    return Ranks(
        *(np.ascontiguousarray(x) for x in (ranked["logprob"][:, 0], likeliest["token"], likeliest["logprob"]))
    )
