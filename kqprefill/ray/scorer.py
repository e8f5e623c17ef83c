"""A model that scores batches of Ray Data, or blocks of files: what an actor holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..backends.budget import Budget
from ..cli.common import open_file
from ..corpus import blocks
from ..corpus.folder import Folder
from ..corpus.identity import model_of, precision_of
from ..corpus.inputs import Block, parquet
from ..corpus.results import Wanted
from ..corpus.scorer import BlockScorer, Done, Settings
from ..engine.model import open_model

if TYPE_CHECKING:
    import pyarrow

_BATCH = "a batch"  # what messages call what rows are from


class Scorer:
    """Scores batches of records: a callable class for `ray.data.Dataset.map_batches`, which makes one an actor.

    A batch's columns "tokens", "prompt", "messages", "completion" and "choices" are what a line of `kqprefill score`
    may have; a null is as good as no such column. All others are handed on.
    """

    def __init__(
        self,
        model: str,
        backend: str = "auto",
        device: int = 0,
        kernels: str = "auto",
        vram: Budget | str | int | None = None,
        batch_tokens: int | None = None,
        per_token: bool = False,
        greedy: bool = False,
        top: int = 0,
        keep_as: str | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        parse_special: bool = True,
        chat_template: str | None = None,
        precision: str = "exact",
    ) -> None:
        """Open the model, as commands name it.

        backend, device, kernels, vram, precision: as for `kqprefill.load`; Ray shows an actor its own GPUs alone, so
        that device 0 is the first of them. batch_tokens, parse_special, chat_template: as in `Model.score`. per_token,
        greedy, top, keep_as, on_error: as the options of `kqprefill score`. Raises as `kqprefill.load` does; InputError
        where pyarrow is missing.
        """
        parquet()
        wanted = Wanted(per_token, greedy, top)
        settings = Settings(wanted, keep_as, on_error == "skip", parse_special, chat_template, batch_tokens)
        self._open(model, backend, device, kernels, vram, precision, settings)

    @classmethod
    def of(cls, model: Mapping[str, Any], settings: Settings) -> Scorer:
        """One that writes blocks. model: arguments of the constructor, "model" to "vram" and "precision"."""
        scorer = cls.__new__(cls)
        scorer._open(settings=settings, **model)
        return scorer

    def _open(
        self,
        model: str,
        backend: str,
        device: int,
        kernels: str,
        vram: Budget | str | int | None,
        precision: str,
        settings: Settings,
    ) -> None:
        file = open_file(model)
        self.model = open_model(
            file,
            backend,
            device,
            kernels,
            vram=vram,
            max_tokens=settings.batch_tokens,
            ranks=True,
            precision=precision,
        )
        self._settings, self._blocks = settings, BlockScorer(self.model, settings)
        self.identity = model_of(file)
        self.precision = precision_of(file, self.model.backend.name, kernels, precision)

    def __call__(self, batch: pyarrow.Table | Mapping[str, Any] | Any) -> pyarrow.Table:
        """The results of a batch (a pyarrow.Table; columns as NumPy arrays by name; a pandas.DataFrame) of N rows.

        A table of N rows in the same order: the columns of a result (docs/json.md) but "index", and those that are
        handed on. Columns and types do not depend on the rows: n_tokens, best, best_per_token int64; logprob,
        mean_logprob, perplexity float64; choices a list of structs of the like; error a text, null where all is well;
        and where they are asked for token_logprobs list<float>, greedy_tokens list<int32>, top_tokens and top_logprobs
        lists of these. Raises KqprefillError at a bad record where they are not skipped.
        """
        table = _table(batch)
        others = blocks.handed_on(table, _BATCH, self._settings.keep_as)
        scored = self._blocks.results(blocks.records_of(table, self._blocks.reader, _BATCH))
        own = blocks.results_table(scored.lines, self._settings.wanted).drop_columns(["index"])
        return blocks.joined(own, others)

    def write(self, block: Block, folder: Folder) -> Done:
        """Score a block of a file, and write its results into a folder. Raises as `BlockScorer.write` does."""
        return self._blocks.write(block, folder)


def _table(batch: Any) -> Any:
    """A batch as a pyarrow.Table."""
    import pyarrow as pa

    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, Mapping):
        return pa.table({name: pa.array(_listed(column)) for name, column in batch.items()})
    return pa.Table.from_pandas(batch, preserve_index=False)


def _listed(column: Any) -> Any:
    """A column of NumPy's as Arrow takes it: arrays in arrays as lists."""
    if isinstance(column, np.ndarray):
        if column.ndim == 1 and column.dtype != object:
            return column
        column = column.tolist()
    return [_listed(value) if isinstance(value, (np.ndarray, list)) else value for value in column]
