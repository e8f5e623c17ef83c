"""kqprefill embed: vectors of many texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..corpus.records import Record
from ..errors import DAMAGED_WEIGHTS, InputError, KqprefillError
from ..terminal import json_line
from .arrays import FORMATS, write_arrays
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    say_batches,
    say_loaded,
)
from .outputs import STDIO, Outputs, force_option
from .progress import Bars, progress_bars
from .records import Records, check_inputs
from .run_options import RunOptions, run_options
from .sources import model_path

if TYPE_CHECKING:
    from ..core import Float32Array
    from ..engine.model import Model

_ASKED = "text", "prompt", "tokens"  # keys of a record that say what to compute
_OURS = frozenset(("index", "n_tokens", "embedding"))  # keys of a result
_LINES = "", ".jsonl", ".ndjson", ".json"  # endings of files that get JSON lines


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.argument("files", metavar="[FILE]...", type=click.Path(), nargs=-1)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default=STDIO,
    help="Where the vectors go, by its ending: JSON lines (.jsonl, or none), an array (.npy, .npz, .safetensors), "
    ".parquet. stdout unless given.",
)
@click.option("--text", "plain", is_flag=True, help="Each line is a text; else it is JSON.")
@click.option(
    "--pooling",
    type=click.Choice(["last", "mean", "cls"]),
    help="Whose output of the final norm: the last token's, the mean of all, the first's.  [default: the file's]",
)
@click.option(
    "--normalise",
    type=click.Choice(["l2", "none"]),
    default="l2",
    show_default=True,
    help="l2: a vector's Euclidean length is 1.",
)
@force_option
@batch_option
@run_options
def embed(
    name: str,
    files: tuple[str, ...],
    output: str,
    plain: bool,
    pooling: str | None,
    normalise: str,
    force: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Write the vectors of many texts.

    Of each line of files (or stdin), in order: a JSON object with "text" or "tokens" (ids), whose other keys are handed
    on; with --text, the text itself. Many texts share a batch; what is packed with what changes no vector. The output
    matrix is not computed.

    \b
    echo '{"text": "Hello"}' | kqprefill embed examples/tiny-qwen3.gguf --pooling last
    printf 'One\\nTwo\\n' | kqprefill embed examples/tiny-qwen3.gguf --text --pooling mean -o vectors.npy
    """
    paths = check_inputs(files or (STDIO,))
    outputs = Outputs(force)
    outputs.reads(model_path(name), "the model")
    for path in paths:
        outputs.reads(path, "stdin" if path == STDIO else "the input")
    outputs.claim(output, "-o")
    write = _writer(output)
    on.wake()
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bars(not on.quiet))
        to = stack.enter_context(outputs.open(output, "-o"))
        model = on.open(open_file(name), bars, batch_tokens, ranks=True)
        stack.enter_context(model)
        if pooling is None:
            from ..engine.embedding import pooling_of

            pooling_of(model.family, None)  # before anything is read
        run = _Run(
            model, Records(paths, lambda content: _item(model, content), asked=_ASKED, ours=_OURS, plain=plain), bars
        )
        begin = time.perf_counter()
        write(to, run.results(pooling, normalise, batch_tokens))
        seconds = time.perf_counter() - begin
        if on.verbose:
            say_loaded(model)
            say_batches(model, batch_tokens)
    rate = run.tokens / seconds
    on.say_summary(f"{run.written} texts, {run.tokens} tokens, {rate:.0f} tokens/s, {how_it_ran(model)}")


def _item(model: Model, content: Any) -> Any:
    """The tokens of a line, as an Item. Raises InputError."""
    from ..engine.scoring import Item

    given = [key for key in _ASKED if key in content]
    if len(given) != 1:
        raise InputError('give either "text" or "tokens"')
    prompt = content[given[0]]
    if isinstance(prompt, str) == (given[0] == "tokens"):
        raise InputError(f'"{given[0]}" must be {"token ids" if given[0] == "tokens" else "a text"}')
    return Item(model.embedding_ids(prompt))


class _Run:
    """Records through the model, in order. written, tokens: how many have come out."""

    def __init__(self, model: Model, records: Records, bars: Bars | None) -> None:
        self._model, self._records, self._bars = model, records, bars
        self._waiting: deque[Record] = deque()
        self.written = self.tokens = 0

    def results(
        self, pooling: str | None, normalise: Any, batch_tokens: int | None
    ) -> Iterator[tuple[Record, Float32Array]]:
        """Each record with its vector. Raises KqprefillError at the first that is bad, and where there is none."""
        import numpy as np

        for vector in self._model.embed(self._ids(), pooling, normalise, batch_tokens):
            record = self._waiting.popleft()
            if not np.isfinite(vector).all():
                raise KqprefillError(f"{record.where}: its vector is not finite: {DAMAGED_WEIGHTS}")
            assert record.item is not None
            self.written += 1
            self.tokens += record.item.tokens
            if self._bars:
                self._bars("embed", record.end, self._records.nbytes, f"{self.written} texts")
            yield record, vector
        if not self.written:
            raise KqprefillError(f"{self._records.name}: there are no texts; each is a line")

    def _ids(self) -> Iterator[list[int] | None]:
        for record in self._records:
            if record is None:
                yield None
                continue
            if record.error is not None or record.item is None:
                raise KqprefillError(f"{record.where}: {record.error}")
            self._waiting.append(record)
            yield record.item.prompt


_Write = Callable[[BinaryIO, Iterator[tuple[Record, "Float32Array"]]], None]


def _writer(output: str) -> _Write:
    """What writes the vectors, by the output's ending, which stdout, pipes and devices need not have. Raises InputError
    for one that says no format, and where a library is missing."""
    name = output.lower()
    if name.endswith(FORMATS):
        return partial(_write_array, output)
    if name.endswith(".parquet"):
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError("-o …parquet needs pyarrow: pip install 'kqprefill[parquet]'") from None
        return _write_parquet
    is_file = output != STDIO and (os.path.isfile(output) or not os.path.exists(output))
    if is_file and os.path.splitext(name)[1] not in _LINES:
        raise InputError(
            f"-o {output}: its ending says no format; there are {', '.join(_LINES[1:])} (JSON lines, as without an "
            f"ending), {', '.join(FORMATS)} (an array) and .parquet"
        )
    return partial(_write_lines, output == STDIO and sys.stdout.isatty())


def _write_lines(terminal: bool, to: BinaryIO, results: Iterator[tuple[Record, Float32Array]]) -> None:
    for record, vector in results:
        numbers = [float(str(x)) for x in vector]  # float32 as the shortest decimals that stand for them
        line = {"index": record.index, "n_tokens": record.item.tokens if record.item else 0, "embedding": numbers}
        to.write(json_line(line | record.extras, terminal))
        to.flush()


def _write_array(path: str, to: BinaryIO, results: Iterator[tuple[Record, Float32Array]]) -> None:
    """One array, float32 [texts, H], which has the name "embeddings" where arrays have names."""
    import numpy as np

    write_arrays(to, path, {"embeddings": np.array([vector for _, vector in results], np.float32)})


def _write_parquet(to: BinaryIO, results: Iterator[tuple[Record, Float32Array]]) -> None:
    """The columns index, n_tokens and embedding, and extras as JSON where there are any."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = list(results)
    width = len(every[0][1])
    flat = pa.array(np.concatenate([vector for _, vector in every]))
    columns: dict[str, Any] = {
        "index": pa.array([record.index for record, _ in every], pa.int64()),
        "n_tokens": pa.array([record.item.tokens if record.item else 0 for record, _ in every], pa.int64()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    if any(record.extras for record, _ in every):
        columns["extras"] = pa.array([json.dumps(record.extras) for record, _ in every])
    pq.write_table(pa.table(columns), to)
