"""kqprefill rerank: how well documents answer a query."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
import math
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ..corpus.records import Record
from ..errors import InputError, KqprefillError
from ..terminal import json_line, print_text
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    read_text,
    say_loaded,
    table,
)
from .outputs import STDIO, Outputs, force_option
from .progress import progress_bars
from .records import Records, check_inputs
from .run_options import RunOptions, run_options
from .sources import model_path

if TYPE_CHECKING:
    from ..engine.model import Model

_OURS = frozenset(("index", "score", "rank"))  # keys of a result


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.argument("files", metavar="[FILE]...", type=click.Path(), nargs=-1)
@click.option("-p", "--query", required=True, metavar="TEXT", help="The query; `@FILE` reads a file.")
@click.option("-o", "--output", metavar="FILE", default=STDIO, help="Where the lines go; stdout unless given.")
@click.option("--text", "plain", is_flag=True, help="Each line is a document; else it is JSON.")
@click.option(
    "--answers",
    metavar="YES,NO",
    default="yes,no",
    show_default=True,
    help="The tokens that are compared, where the file has no classifier.",
)
@click.option("--top", metavar="N", type=click.IntRange(1), help="Only the best N, the best first.")
@force_option
@batch_option
@run_options
def rerank(
    name: str,
    files: tuple[str, ...],
    query: str,
    output: str,
    plain: bool,
    answers: str,
    top: int | None,
    force: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Say how well documents answer a query.

    By a model that was trained for it (Qwen3-Reranker), of each line of files (or stdin): a JSON object with "text",
    whose keys are handed on; with --text, the document itself. score is the probability of "yes". A line of JSON comes
    out for each document; with --top on a terminal, a table.

    \b
    echo '{"text": "Bread."}' | kqprefill rerank examples/tiny-qwen3.gguf -p "What is it?" --answers y,n
    """
    words = answers.split(",")
    if len(words) != 2 or not all(words):
        raise click.UsageError(f"--answers {answers}: give two, separated by a comma")
    paths = check_inputs(files or (STDIO,))
    outputs = Outputs(force)
    outputs.reads(model_path(name), "the model")
    outputs.reads_text(query, "--query")
    for path in paths:
        outputs.reads(path, "stdin" if path == STDIO else "the input")
    outputs.claim(output, "-o")
    asked = read_text(query, "--query").rstrip("\r\n")
    on.wake()
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bars(not on.quiet and not sys.stdout.isatty()))
        to = stack.enter_context(outputs.open(output, "-o"))
        model = on.open(open_file(name), bars, batch_tokens, ranks=True)
        stack.enter_context(model)
        records = Records(paths, partial(_item, model, asked), asked=(), ours=_OURS, plain=plain)
        begin, count = time.perf_counter(), 0
        terminal = output == STDIO and sys.stdout.isatty()
        lines: Iterable[dict[str, Any]] = _results(model, records, (words[0], words[1]))
        if top is not None:
            every = sorted(lines, key=lambda line: -line["score"])
            count = len(every)
            lines = [{"rank": rank, **line} for rank, line in enumerate(every[:top])]
        if top is not None and terminal:
            cells = [[str(line["rank"]), f"{line['score']:.4f}", str(line["index"]), line["text"]] for line in lines]
            print_text(table(["rank", "score", "index", "text"], cells))
            lines = ()
        for number, line in enumerate(lines, 1):
            to.write(json_line(line, terminal))
            to.flush()
            count = number if top is None else count
        if on.verbose:
            say_loaded(model)
    seconds = time.perf_counter() - begin
    on.say_summary(f"{count} documents, {seconds:.2f} s, {how_it_ran(model)}")


def _item(model: Model, query: str, content: Any) -> Any:
    """A document's question, as an Item. Raises InputError."""
    from ..engine.reranking import question_of
    from ..engine.scoring import Item

    document = content.get("text")
    if not isinstance(document, str):
        raise InputError('give the document as "text"')
    ids = model.tokenize(question_of(model, query, document))
    if len(ids) >= model.config.context_length:
        raise InputError(f"{len(ids)} tokens with the query: past the context length of {model.config.context_length}")
    return Item(ids)


def _results(model: Model, records: Records, answers: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """A line of each document. Raises KqprefillError at the first that is bad, and where there is none."""
    from ..engine.reranking import relevances_of

    waiting: deque[Record] = deque()

    def questions() -> Iterator[list[int] | None]:
        for record in records:
            if record is None:
                yield None
                continue
            if record.error is not None or record.item is None:
                raise KqprefillError(f"{record.where}: {record.error}")
            waiting.append(record)
            yield record.item.prompt

    found = False
    for score in relevances_of(model, questions(), answers):
        record, found = waiting.popleft(), True
        if not math.isfinite(score):
            raise KqprefillError(f"{record.where}: its score is not finite: the file's weights are damaged")
        yield {"index": record.index, "score": score, **record.extras}
    if not found:
        raise KqprefillError(f"{records.name}: there are no documents; each is a line")
