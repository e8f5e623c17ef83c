"""kqprefill imatrix: importance matrices for llama-quantize, as llama-imatrix makes them."""

from __future__ import annotations

from contextlib import ExitStack, suppress
import math
import os
import time
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    read_text_file,
    read_tokens,
    say,
    say_batches,
    say_loaded,
)
from .imatrix_report import report, say_gaps
from .interrupts import Interrupted
from .outputs import STDIO, Outputs, force_option
from .progress import Watch, progress_bars
from .run_options import RunOptions, run_options
from .sources import from_home, model_path
from .texts import ids_and_bos

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..engine.imatrix import Progressed
    from ..engine.imatrix_file import ImportanceMatrix
    from ..gguf import ModelFile

_CHECKPOINT = ".checkpoint"  # what an output's name is followed by


@click.command()
@click.argument("name", metavar="[MODEL]", type=click.Path(), required=False)
@click.option("-f", "--file", "text", metavar="FILE", help="The text, for the model's own tokenizer; `-` is stdin.")
@click.option("--tokens", metavar="IDS", help="Token ids instead: `1,2,3`, `-` for stdin, `@FILE`.")
@click.option("-o", "--output", "out", metavar="FILE", help="The importance matrix.")
@click.option(
    "--output-format",
    "kind",
    type=click.Choice(("gguf", "dat")),
    default="gguf",
    show_default=True,
    help="dat: what llama.cpp read before 2025.",
)
@click.option(
    "-c",
    "--context",
    default=512,
    show_default=True,
    metavar="T",
    type=click.IntRange(1),
    envvar="KQPREFILL_CONTEXT",
    show_envvar=True,
    help="Tokens of a chunk.",
)
@click.option("--chunks", metavar="N", type=click.IntRange(1), help="Chunks at most.  [default: all]")
@click.option("--from-chunk", "first", metavar="N", type=click.IntRange(0), default=0, help="Chunks to skip before.")
@click.option(
    "--in-file", "in_files", metavar="FILE", multiple=True, help="A matrix to add, of either format; can be repeated."
)
@click.option("--process-output", is_flag=True, help="Also the output matrix, where it is not the embedding.")
@click.option("--parse-special", is_flag=True, help="Texts of control tokens are these tokens; else plain text.")
@click.option(
    "--save-frequency",
    metavar="N",
    type=click.IntRange(1),
    help="Also write FILE.at_N each N chunks.  [default: never]",
)
@click.option(
    "--checkpoint",
    "seconds",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="How often FILE.checkpoint is written, which is removed at the end; 0: never.",
)
@click.option("--resume", is_flag=True, help="Go on from FILE.checkpoint, if it is there.")
@click.option("--show-statistics", is_flag=True, help="Print what the sums of each tensor and layer are like.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@force_option
@batch_option
@run_options
def imatrix(
    name: str | None,
    text: str | None,
    tokens: str | None,
    out: str | None,
    kind: str,
    context: int,
    chunks: int | None,
    first: int,
    in_files: tuple[str, ...],
    process_output: bool,
    parse_special: bool,
    save_frequency: int | None,
    seconds: float,
    resume: bool,
    show_statistics: bool,
    as_json: bool,
    force: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Make an importance matrix, or add up several.

    Of a text, for llama-quantize, which weighs columns by it; or of the matrices that there are.

    As llama-imatrix does: of what goes into each product, the squares of each column are summed over chunks of
    --context tokens, by expert where there are experts, each chunk beginning with BOS where the file asks for it. No
    logits are computed, and no perplexity is printed.

    \b
    kqprefill imatrix examples/tiny-qwen3.gguf --file README.md -c 256 -o tiny.imatrix
    kqprefill imatrix --in-file tiny.imatrix --show-statistics
    """
    _check_usage(name, text, tokens, out, in_files, show_statistics or as_json, save_frequency, resume)
    outputs = Outputs(force)
    in_files = tuple(map(from_home, in_files))
    for path in in_files:
        outputs.reads(path, "a file of --in-file")
    if text is not None:
        outputs.reads(from_home(text), "the file of --file")
    if name is not None:
        outputs.reads(model_path(name), "the model")
    outputs.reads_text(tokens, "--tokens")
    if out is not None:
        outputs.claim(out, "--output")
        outputs.try_folder(out, "--output")
    ids = None if tokens is None else read_tokens(tokens)
    words = None if text is None else read_text_file(text, "--file")
    if name is not None:
        on.wake()
    from ..engine.imatrix_file import read_matrix, write_matrix

    matrices = [read_matrix(path, context) for path in in_files]
    if name is not None:
        saver = _Saver(outputs, out, kind, context, text or "", matrices, save_frequency, seconds)
        saver.begin(resume, force, on.quiet)
        with ExitStack() as stack:
            bars = stack.enter_context(progress_bars(not on.quiet))
            watch = Watch(bars, "chunks")
            file = open_file(name)
            stack.enter_context(file)
            for path, matrix in zip(in_files, matrices):
                _refuse_misfits(path, matrix, file)
            ids, bos = ids_and_bos(words, ids, parse_special, file.metadata, name)
            count = max(0, min(len(ids) // context - first, chunks or len(ids)))
            saver.claim_copies(count)
            model = stack.enter_context(on.open(file, bars, batch_tokens, ranks=True))
            from ..engine.imatrix import importance_matrix

            watch.begin(context * count)
            begun = time.perf_counter()
            try:
                made = importance_matrix(
                    model,
                    ids,
                    context,
                    first,
                    chunks,
                    bos,
                    process_output,
                    batch_tokens,
                    watch,
                    saver.resumed,
                    saver.hear,
                    save_frequency,
                )
            except Interrupted:
                on.say(f"interrupted: {watch.done:.0%} of the chunks were read{saver.way_on()}")
                raise
            took = time.perf_counter() - begun
            if on.verbose:
                say_loaded(model)
                say_batches(model, batch_tokens)
        matrix = saver.whole(made)
        done = made.chunks - (saver.resumed.chunks if saver.resumed is not None else 0)
        rate = f"{done * context / took:.0f} tokens/s"
        on.say_summary(f"{done} chunks of {context} tokens, {rate}, {how_it_ran(model)}")
        if not on.quiet:
            say_gaps(matrix)
    else:
        matrix = matrices[0]
        for other in matrices[1:]:
            matrix += other
    if out is not None:
        with outputs.open(out, "--output") as opened:
            write_matrix(matrix, kind, opened)
        if name is not None:
            saver.end()
    report(matrix, name, on.precision if name else None, show_statistics, as_json)


def _check_usage(
    name: str | None,
    text: str | None,
    tokens: str | None,
    out: str | None,
    in_files: Sequence[str],
    tells: bool,
    save_frequency: int | None,
    resume: bool,
) -> None:
    """Raises UsageError for options that do not go together."""
    if name is None and (text is not None or tokens is not None):
        raise click.UsageError("a text needs a MODEL, and to add up what --in-file names needs neither")
    if name is None and not in_files:
        raise click.UsageError("give a MODEL and a text, or files to add up (--in-file)")
    if name is not None and (text is None) == (tokens is None):
        raise click.UsageError("give the text either as --file FILE or as --tokens IDS")
    if out is None and not (name is None and tells):
        raise click.UsageError("name the file to write: --output FILE")
    if out == STDIO and (save_frequency is not None or resume or tells):
        raise click.UsageError("--save-frequency, --resume, --show-statistics and --json need a file as --output")


def _refuse_misfits(path: str, matrix: ImportanceMatrix, file: ModelFile) -> None:
    """Raises InputError for a matrix to be added that is of a model of another shape."""
    for name, entry in matrix.entries.items():
        tensor = file.tensors.get(name)
        columns = 0 if tensor is None else math.prod((*tensor.shape[:-2], tensor.shape[-1]))
        if len(entry.sums) != columns:
            what = "is not there" if tensor is None else f"has inputs of {columns} columns"
            raise InputError(f"{path}: {len(entry.sums)} sums of {name}, which {what} in {file.path}; leave it out")


class _Saver:
    """What a run writes before its end: checkpoints that it can be resumed from, and copies of the matrix so far."""

    def __init__(
        self,
        outputs: Outputs,
        out: str | None,
        kind: str,
        context: int,
        dataset: str,
        others: Sequence[ImportanceMatrix],
        copies: int | None,
        seconds: float,
    ) -> None:
        assert out is not None, "a run names its output"
        self._outputs, self._out, self._kind = outputs, out, kind
        self._context, self._dataset, self._others = context, dataset, others
        self._copies, self._seconds = copies, seconds if out != STDIO else 0.0
        self._path = out + _CHECKPOINT
        self._last = time.monotonic()
        self.resumed: Progressed | None = None

    def begin(self, resume: bool, force: bool, quiet: bool) -> None:
        """Read an earlier run's checkpoint where asked to. Raises InputError where one is there that is in the way."""
        if self._out == STDIO:
            return
        if os.path.lexists(self._path) and not (resume or force):
            raise InputError(
                f"{self._path}: an earlier run has left it; --resume goes on from there, --force begins anew"
            )
        self._outputs.claim(self._path, "the checkpoint of --output", may_exist=True)
        if resume and os.path.exists(self._path):
            from ..engine.imatrix import read_checkpoint

            self.resumed = read_checkpoint(self._path)
            if not quiet:
                say(f"{self._path}: {self.resumed.chunks} chunks are done")

    def way_on(self) -> str:
        """What can be done after an interrupt, if anything."""
        kept = self._out != STDIO and os.path.exists(self._path)
        return f"; --resume goes on from {self._path}" if kept else ""

    def claim_copies(self, count: int) -> None:
        """Say which copies a run of so many chunks will write."""
        done = self.resumed.chunks if self.resumed is not None else 0
        if self._copies is not None:
            for chunks in range(done - done % self._copies + self._copies, count + 1, self._copies):
                self._outputs.claim(self._copy_at(chunks), "--save-frequency")

    def _copy_at(self, chunks: int) -> str:
        return f"{self._out}.at_{chunks}"

    def hear(self, done: int, so_far: Callable[[], Progressed]) -> None:
        """So many chunks have been started on; called after each batch."""
        from ..engine.imatrix_file import write_matrix

        if self._copies is not None and done % self._copies == 0:
            with self._outputs.open(self._copy_at(done), "--save-frequency") as file:
                write_matrix(self.whole(so_far()), self._kind, file)
        if self._seconds and time.monotonic() - self._last >= self._seconds:
            with self._outputs.open(self._path, "the checkpoint of --output", again=True) as file:
                so_far().write(file)
            self._last = time.monotonic()

    def whole(self, made: Progressed) -> ImportanceMatrix:
        """What was summed, and what was to be added to it, in llama-imatrix's order."""
        from ..engine.imatrix_file import ImportanceMatrix

        matrix = ImportanceMatrix({}, self._context)
        for other in self._others:
            matrix += other
        return matrix + made.matrix(self._context, self._dataset)

    def end(self) -> None:
        """The output is written: the checkpoint goes."""
        if self._out != STDIO:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
