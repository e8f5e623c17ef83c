"""kqprefill score: log-probabilities of many prompts, JSON lines in and out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
import math
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ..backends.wake import wake_gpu
from ..errors import InputError, KqprefillError
from .common import (
    STDIO,
    batch_option,
    device_options,
    memory_option,
    open_file,
    output_file,
    progress_bars,
    say_loaded,
    say_summary,
    volume_options,
    warner,
)
from .records import Lines, Record, Records

if TYPE_CHECKING:
    from ..core import Float32Array, Progress
    from ..engine.model import Model
    from ..engine.scoring import Item, Scored
    from .page import Page

_OURS = frozenset(
    (
        "index n_tokens logprob mean_logprob perplexity best best_per_token choices error "
        "token_logprobs greedy_tokens top_tokens top_logprobs"
    ).split()
)
_HTML_TOP = 5  # alternatives on the page


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.argument("records", metavar="[JSONL]", type=click.Path(), default=STDIO)
@click.option(
    "-o", "--output", metavar="FILE", default=STDIO, help="Where the results go, line by line; stdout unless given."
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
    help='At a bad line: end with status 1, or write {"index", "error"} and go on.',
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
@batch_option
@device_options
@memory_option
@volume_options
def score(
    name: str,
    records: str,
    output: str,
    resume: bool,
    on_error: str,
    per_token: bool,
    greedy: bool,
    top: int,
    html: str | None,
    batch_tokens: int,
    backend: str,
    device: int,
    kernels: str,
    vram: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the log-probabilities of many prompts.

    Of each line of a JSONL file (or stdin), one JSON object a line, in order.

    A line has "prompt" (text) or "tokens" (ids), and perhaps "completion", which is then scored given the prompt, or
    "choices", several of them; its other keys are handed on. logprob is the natural logarithm, over n_tokens tokens:
    all but the first, or the completion's. Many prompts share a batch; what is packed with what changes no figure.

    \b
    echo '{"prompt": "Hello"}' | kqprefill score examples/tiny-qwen3.gguf
    kqprefill score examples/tiny-qwen3.gguf examples/questions.jsonl --per-token
    """
    if resume and (output == STDIO or html):
        raise click.UsageError("--resume continues an --output FILE, without --html")
    if html == STDIO:
        raise click.UsageError("--html - : the results have stdout; name a file")
    wake_gpu(backend, device)
    from ..engine.model import open_model

    wanted = {"per_token": per_token, "greedy": greedy, "top": top}
    with ExitStack() as stack:
        lines = stack.enter_context(Lines(output, resume))
        # Bars and lines would mix on a terminal.
        progress = stack.enter_context(progress_bars(not quiet and not (output == STDIO and sys.stdout.isatty())))
        page_file = stack.enter_context(output_file(html)) if html else None
        model = stack.enter_context(
            open_model(
                open_file(name),
                backend,
                device,
                kernels,
                progress,
                warner(quiet),
                vram,
                max_tokens=batch_tokens,
                ranks=True,
            )
        )
        if top > model.config.vocab_size:
            raise InputError(f"--top {top}: the vocabulary has {model.config.vocab_size} tokens")
        top = max(top, int(greedy), min(_HTML_TOP, model.config.vocab_size) if html else 0)
        page = None
        if page_file is not None:
            from .page import Page

            page = Page(page_file, model, name, min(_HTML_TOP, top))
        run = _Run(model, Records(records, model.item, lines.done), lines, wanted, on_error == "skip", page, progress)
        begin = time.perf_counter()
        run.go(batch_tokens, top)
        seconds = time.perf_counter() - begin
        if page:
            page.end()
        if verbose:
            say_loaded(model)
    rate, where = run.tokens / seconds, f"{model.backend.name} ({model.backend.device_name})"
    say_summary(f"{run.scored} records, {run.tokens} tokens, {rate:.0f} tokens/s, {where}", quiet, verbose)
    if run.bad and not quiet:
        click.echo(
            f"kqprefill: {run.bad} of {run.bad + run.scored} records could not be scored; their lines say why", err=True
        )


class _Run:
    """Records through the model, and their results, in order, to where they go."""

    def __init__(
        self,
        model: Model,
        records: Records,
        lines: Lines,
        wanted: dict[str, Any],
        skip_bad: bool,
        page: Page | None,
        progress: Progress | None,
    ) -> None:
        self._model, self._records, self._lines, self._wanted = model, records, lines, wanted
        self._skip_bad, self._page, self._progress = skip_bad, page, progress
        self._waiting: deque[Record] = deque()  # records without their result
        self._stopped_by: tuple[int, str | None] | None = None  # a bad record's line, and what is wrong with it
        self.scored = self.bad = self.tokens = 0

    def go(self, batch_tokens: int, top: int) -> None:
        """Score all records. Raises KqprefillError at the first bad one, unless they are skipped."""
        for result in self._model.score(self._items(), batch_tokens, top):
            self._write_bad()
            if self._stopped_by:
                break
            self._write(self._waiting.popleft(), result)
        self._write_bad()
        if self._stopped_by:
            line, error = self._stopped_by
            raise KqprefillError(f"{self._records.name}: line {line}: {error}")

    def _items(self) -> Iterator[Item | None]:
        for record in self._records:
            if record is None:  # all before it have been written once the scorer asks for more
                yield None
                self._write_bad()
                continue
            self._check_resumed()
            self._waiting.append(record)
            if record.error is None:
                yield record.item
            elif not self._skip_bad:
                return

    def _check_resumed(self) -> None:
        """That the last line of a resumed output is of the record that is in its place, and was made with these
        options."""
        before, last = self._records.last_skipped, self._lines.last
        self._lines.last = None
        if last is None or before is None:
            return
        try:
            same = self._is_of(last, before)
        except (TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise InputError(
                f"{self._lines.name}: its last line was made of another record, or with other options, "
                f"than line {before.line} of {self._records.name}"
            )

    def _is_of(self, line: dict[str, Any], record: Record) -> bool:
        if any(line.get(key) != value for key, value in record.extras.items() if key not in _OURS):
            return False
        if "error" in line and not line.keys() & {"n_tokens", "best"}:
            return True  # perhaps of its text, perhaps of its result
        results, item = line.get("choices", [line]), record.item
        counts = [len(c) - (not item.prompt) for c in item.continuations or [item.prompt[1:]]] if item else []
        options = {
            "token_logprobs": self._wanted["per_token"],
            "greedy_tokens": self._wanted["greedy"],
            "top_tokens": self._wanted["top"] > 0,
        }
        return [result["n_tokens"] for result in results] == counts and all(
            (key in results[0]) == asked for key, asked in options.items()
        )

    def _write_bad(self) -> None:
        """The lines of bad records that come next, or stop at the first."""
        while self._waiting and self._waiting[0].error is not None and not self._stopped_by:
            self._fail(self._waiting.popleft())

    def _fail(self, record: Record, error: str | None = None) -> None:
        error = error or record.error
        if not self._skip_bad:
            self._stopped_by = record.line, error
            return
        self.bad += 1
        self._write_line({"index": record.index, "error": f"line {record.line}: {error}"}, record)

    def _write(self, record: Record, result: Scored | list[Scored]) -> None:
        several = result if isinstance(result, list) else [result]
        if not all(scored.finite for scored in several):
            self._fail(record, "its logits hold NaN or infinities: the file's weights are damaged or out of range")
            return
        described = [self._describe(scored) for scored in several]
        line: dict[str, Any] = {"index": record.index}
        if isinstance(result, list):
            means = [-math.inf if scored.mean_logprob is None else scored.mean_logprob for scored in several]
            best = max(range(len(several)), key=lambda i: several[i].logprob)
            per_token = max(range(len(several)), key=lambda i: means[i])
            line |= {"best": best, "best_per_token": per_token, "choices": described}
        else:
            line |= described[0]
        self._write_line(line, record)
        assert record.item is not None, "a result is of a record that had something to score"
        self.scored += 1
        self.tokens += record.item.tokens
        if self._progress and self._records.nbytes:
            self._progress("score", record.end, self._records.nbytes)
        if self._page:
            self._page.add(record.index, record.item, several)

    def _write_line(self, line: dict[str, Any], record: Record) -> None:
        self._lines.write(line | {key: value for key, value in record.extras.items() if key not in line})

    def _describe(self, scored: Scored) -> dict[str, Any]:
        perplexity = scored.perplexity
        line: dict[str, Any] = {
            "n_tokens": scored.n_tokens,
            "logprob": scored.logprob,
            "mean_logprob": scored.mean_logprob,
            "perplexity": None if perplexity == math.inf else perplexity,
        }
        if self._wanted["per_token"]:
            line["token_logprobs"] = _numbers(scored.logprobs)
        if self._wanted["greedy"]:
            line["greedy_tokens"] = scored.top_tokens[:, 0].tolist()
        if top := self._wanted["top"]:
            line["top_tokens"] = scored.top_tokens[:, :top].tolist()
            line["top_logprobs"] = [_numbers(row) for row in scored.top_logprobs[:, :top]]
        return line


def _numbers(floats: Float32Array) -> list[float]:
    """float32 as the shortest decimals that stand for them."""
    return [float(str(x)) for x in floats]
