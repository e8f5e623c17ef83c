"""kqprefill score: log-probabilities of many prompts, JSON lines in and out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ..backends import PRECISIONS
from ..corpus.records import OURS, Record
from ..corpus.results import NOT_FINITE, Wanted, all_finite, described
from ..corpus.scorer import Form, Settings
from ..errors import InputError, KqprefillError
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    read_template,
    say_batches,
    say_loaded,
    special_option,
    template_option,
)
from .interrupts import Interrupted
from .lines import Lines
from .outputs import STDIO, Outputs, force_option
from .progress import Bars, progress_bars
from .records import Records, check_inputs
from .run_options import RunOptions, run_options
from .score_folder import FolderOptions, folder_options, is_folder, score_folder, status_of
from .sources import from_home, model_path

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.scoring import Item, Scored
    from .page import Page

_HTML_TOP = 5  # alternatives on the page


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.argument("files", metavar="[JSONL]...", type=click.Path(), nargs=-1)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default=STDIO,
    help="Where the results go, line by line; stdout unless given. FOLDER/: a file for each block of the inputs.",
)
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted --output: records that have their line are skipped."
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    envvar="KQPREFILL_ON_ERROR",
    show_envvar=True,
    help='At a bad line: end with status 1, or write {"index", "error"}, go on, and end with status 3.',
)
@click.option(
    "--keep-as",
    metavar="NAME",
    help="Hand a record's other keys on as one object under NAME, whatever they are called; else each keeps its name, "
    "and one that is called as a result's is an error.",
)
@click.option("--per-token", is_flag=True, help="Add token_logprobs.")
@click.option("--greedy", is_flag=True, help="Add greedy_tokens, the likeliest at each place.")
@click.option(
    "--top",
    default=0,
    metavar="K",
    type=click.IntRange(0, 1024),
    help="Add top_tokens and top_logprobs, the K likeliest at each place.",
)
@click.option("--html", metavar="FILE", help="Also write one page that shows the texts, shaded by log-probability.")
@folder_options
@template_option
@special_option
@force_option
@batch_option
@run_options
@click.pass_context
def score(
    context: click.Context,
    name: str,
    files: tuple[str, ...],
    output: str,
    resume: bool,
    on_error: str,
    keep_as: str | None,
    per_token: bool,
    greedy: bool,
    top: int,
    html: str | None,
    ray: str | None,
    replicas: int | None,
    block: str | None,
    form: Form | None,
    chat_template: str | None,
    no_special: bool,
    force: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Write the log-probabilities of many prompts.

    Of each line of JSONL files (or stdin), one JSON object a line, in order. With -o FOLDER/, of files, globs and
    folders of JSONL and Parquet, and with --ray on many GPUs or machines.

    A line has "prompt" (text), "tokens" (ids) or "messages" (a conversation, for the chat template), and perhaps
    "completion", which is then scored given the prompt, or "choices", several of them; its other keys are handed on.
    logprob is the natural logarithm, over n_tokens tokens: all but the first, or the completion's. Many prompts share a
    batch; what is packed with what changes no figure.

    Exit status 3 where --on-error skip has left records out, 1 where none was scored.

    \b
    echo '{"prompt": "Hello"}' | kqprefill score examples/tiny-qwen3.gguf
    kqprefill score examples/tiny-qwen3.gguf examples/questions.jsonl --per-token
    kqprefill score examples/tiny-qwen3.gguf 'examples/*.jsonl' -o scores/
    """
    if resume and (output == STDIO or html):
        raise click.UsageError("--resume continues an --output FILE, without --html")
    if html == STDIO:
        raise click.UsageError("--html - : the results have stdout; name a file")
    ours = OURS | _mark(on.precision).keys()
    if keep_as is not None and (keep_as in ours or not keep_as):
        raise click.UsageError(f"--keep-as {keep_as}: a result has a key of that name; choose another")
    wanted = Wanted(per_token, greedy, top)
    options = FolderOptions(ray, replicas, block, form)
    if is_folder(output):
        if html:
            raise click.UsageError("--html: of an output that is a file, not a folder")
        template = read_template(chat_template)
        settings = Settings(wanted, keep_as, on_error == "skip", not no_special, template, batch_tokens, form)
        context.exit(score_folder(name, files, output, resume, settings, options, on))
    if given := options.given(context):
        raise click.UsageError(f"{given}: with an output folder, -o FOLDER/")
    paths = check_inputs(files or (STDIO,), "; with -o FOLDER/ it is scored into a folder")
    outputs = Outputs(force)
    if chat_template is not None:
        outputs.reads(from_home(chat_template), "the file of --chat-template")
    _claim(outputs, model_path(name), paths, output, html)
    template = read_template(chat_template)
    on.wake()

    run: _Run | None = None
    lines: Lines | None = None
    try:
        with ExitStack() as stack:
            lines = stack.enter_context(Lines(output, resume))
            # Bars and lines would mix on a terminal.
            bars = stack.enter_context(progress_bars(not on.quiet and not (output == STDIO and sys.stdout.isatty())))
            page_file = stack.enter_context(outputs.open(html, "--html")) if html else None
            file = open_file(name)
            model = on.open(file, bars, batch_tokens, ranks=True)
            stack.enter_context(model)
            if top > model.config.vocab_size:
                raise InputError(f"--top {top}: the vocabulary has {model.config.vocab_size} tokens")
            top = max(wanted.ranks, min(_HTML_TOP, model.config.vocab_size) if html else 0)
            page = None
            if page_file is not None:
                from .page import Page

                page = Page(page_file, model, name, min(_HTML_TOP, top))
            make = partial(model.item, parse_special=not no_special, chat_template=template)
            records = Records(paths, make, lines.done, keep_as, ours=ours)
            run = _Run(model, records, lines, wanted, on_error == "skip", page, bars)
            begin = time.perf_counter()
            run.go(batch_tokens, top)
            seconds = time.perf_counter() - begin
            bad = run.check_scored()
            if page:
                page.end()
            if on.verbose:
                say_loaded(model)
                say_batches(model, batch_tokens, top)
    except Interrupted:
        if lines is not None and run is not None:
            how = f" in {output}; --resume goes on from there" if output != STDIO and lines.is_file else ""
            done = f"{run.written} records are done{how}" if run.written else "no record is done"
            on.say(f"interrupted: {done}")
        raise
    rate = run.tokens / seconds
    on.say_summary(f"{run.scored} records, {run.tokens} tokens, {rate:.0f} tokens/s, {how_it_ran(model)}")
    context.exit(status_of(bad, run.written, on))


def _claim(outputs: Outputs, model: str, paths: Sequence[str], output: str, html: str | None) -> None:
    """What is read and written, held against one another."""
    outputs.reads(model, "the model")
    for path in paths:
        outputs.reads(path, "stdin" if path == STDIO else "the input")
    outputs.claim(output, "-o", may_exist=True)
    if html:
        outputs.claim(html, "--html")


class _Run:
    """Records through the model, and their results, in order, to where they go."""

    def __init__(
        self,
        model: Model,
        records: Records,
        lines: Lines,
        wanted: Wanted,
        skip_bad: bool,
        page: Page | None,
        bars: Bars | None,
    ) -> None:
        self._model, self._records, self._lines, self._wanted = model, records, lines, wanted
        self._skip_bad, self._page, self._bars = skip_bad, page, bars
        self._waiting: deque[Record] = deque()  # records without their result
        self._taken: deque[Record] = deque()  # of these those that no batch has been started with
        self._running_tokens = self._running_end = 0  # of batches that have been started; in bytes
        self._stopped_by: Record | None = None  # a bad record
        self._first_error = ""
        self._begin, self._end, self._shown = time.perf_counter(), 0, 0.0  # the last in bytes: written, on the bar
        self.scored = self.bad = self.tokens = 0

    @property
    def written(self) -> int:
        """Lines that the output has, with those of the run that is continued."""
        return self._lines.done + self._lines.written

    def go(self, batch_tokens: int | None, top: int) -> None:
        """Score all records. Raises KqprefillError at the first bad one, unless they are skipped."""
        progress = self._show if self._bars else None
        for result in self._model.score(self._items(), batch_tokens, top, progress, starts=self._starts):
            self._write_bad()
            if self._stopped_by:
                break
            self._write(self._waiting.popleft(), result)
        self._write_bad()
        if self._stopped_by:
            raise KqprefillError(self._first_error)

    def check_scored(self) -> int:
        """How many records of the whole output could not be scored. Raises KqprefillError where none was."""
        bad = self._lines.bad + self.bad
        if not self.written:
            raise KqprefillError(f"{self._records.name}: there are no records; each is a JSON object on a line")
        if bad == self.written:
            first = f"; the first: {self._first_error}" if self._first_error else ""
            raise KqprefillError(f"none of the {bad} records could be scored{first}")
        return bad

    def _show(self, stage: str, done: int, total: int) -> None:
        """How far it is: what is written, and of what is being computed as many parts as layers are done."""
        assert self._bars is not None
        if stage != "prefill":
            self._bars(stage, done, total)
            return
        part = done / total
        end = self._end + part * (self._running_end - self._end)
        self._shown = max(self._shown, end)
        rate = (self.tokens + part * self._running_tokens) / (time.perf_counter() - self._begin)
        note = f"{self.scored + self.bad} records, {rate:.0f} tokens/s"
        self._bars("score", self._shown, self._records.nbytes, note)

    def _starts(self, count: int) -> None:
        """A batch has been started that completes so many records."""
        for record in (self._taken.popleft() for _ in range(count)):
            assert record.item is not None, "only what has something to score is in a batch"
            self._running_tokens, self._running_end = self._running_tokens + record.item.tokens, record.end

    def _items(self) -> Iterator[Item | None]:
        for record in self._records:
            if record is None:  # all before it have been written once the scorer asks for more
                yield None
                self._write_bad()
                continue
            self._check_resumed()
            self._waiting.append(record)
            if record.item is not None and record.error is None:
                self._taken.append(record)
                yield record.item
            elif not self._skip_bad:
                return
        self._check_resumed()

    def _check_resumed(self) -> None:
        """That the last line of a resumed output is of the record that is in its place, and was made with these
        options, at this precision."""
        before, last = self._records.last_skipped, self._lines.last
        self._lines.last = None
        if last is None or before is None:
            return
        begun, now = last.get("precision"), self._model.precision
        if begun not in PRECISIONS or "precision" in before.extras:  # the record's own key, if any
            begun = "exact"
        if begun != now:
            raise InputError(
                f"{self._lines.name} was begun at precision {begun}, and this is {now}: give --precision {begun}, or "
                "name another file"
            )
        try:
            same = self._is_of(last, before)
        except (TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise InputError(
                f"{self._lines.name}: its last line was made of another record, or with other options, "
                f"than {before.where}"
            )

    def _is_of(self, line: dict[str, Any], record: Record) -> bool:
        if any(line.get(key) != value for key, value in record.extras.items()):
            return False
        if "error" in line:
            return True  # perhaps of its text, perhaps of its result
        results, item = line.get("choices", [line]), record.item
        counts = [len(c) - (not item.prompt) for c in item.continuations or [item.prompt[1:]]] if item else []
        return [result["n_tokens"] for result in results] == counts and all(
            (key in results[0]) == asked for key, asked in self._wanted.keys.items()
        )

    def _write_bad(self) -> None:
        """The lines of bad records that come next, or stop at the first."""
        while self._waiting and self._waiting[0].error is not None and not self._stopped_by:
            self._fail(self._waiting.popleft())

    def _fail(self, record: Record, error: str | None = None) -> None:
        error = error or record.error
        self._first_error = self._first_error or f"{record.where}: {error}"
        if not self._skip_bad:
            self._stopped_by = record
            return
        self.bad += 1
        where = record.where if self._records.several else record.place
        self._write_line({"index": record.index, "error": f"{where}: {error}"}, record)

    def _write(self, record: Record, result: Scored | list[Scored]) -> None:
        assert record.item is not None, "a result is of a record that had something to score"
        self._running_tokens -= record.item.tokens
        if not all_finite(result):
            self._fail(record, NOT_FINITE)
            return
        self._write_line({"index": record.index} | described(result, self._wanted), record)
        self.scored += 1
        self.tokens += record.item.tokens
        self._end = record.end
        if self._bars:
            self._show("prefill", 0, 1)
        if self._page:
            self._page.add(record.index, record.item, result if isinstance(result, list) else [result])

    def _write_line(self, line: dict[str, Any], record: Record) -> None:
        self._lines.write(line | _mark(self._model.precision) | record.extras)


def _mark(precision: str) -> dict[str, str]:
    """What is added to each line where the precision is not the usual one, so that a run that goes on can tell."""
    return {} if precision == "exact" else {"precision": precision}
