"""kqprefill perplexity: of a long text, comparable with llama-perplexity's."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from ..terminal import json_value
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    print_object,
    say_batches,
    say_loaded,
    size,
    special_option,
)
from .interrupts import Interrupted
from .outputs import STDIO, Outputs, force_option, free_room
from .progress import Watch, progress_bars
from .run_options import RunOptions, run_options
from .sources import model_path
from .texts import LongText, text_options

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.perplexity import Perplexity


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@text_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--save-logits",
    "saved",
    metavar="FILE",
    help="Also write the log-probabilities of every token of the vocabulary, as llama-perplexity --kl-divergence-base "
    "does: for `kqprefill kld --base FILE`, or llama-perplexity.",
)
@force_option
@special_option
@batch_option
@run_options
def perplexity(
    name: str,
    text: str | None,
    tokens: str | None,
    context: int,
    chunks: int | None,
    as_json: bool,
    saved: str | None,
    force: bool,
    no_special: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Print the perplexity of a text, and its standard error.

    As llama-perplexity does: windows of --context tokens, of which the second half is scored, each beginning with BOS
    where the file asks for it. What --save-logits writes is 2 bytes for each token of the vocabulary at each scored
    place: 78 MB a window of 512 with a vocabulary of 152,000.

    \b
    kqprefill perplexity examples/tiny-qwen3.gguf --file README.md -c 256
    """
    outputs = Outputs(force)
    given = LongText(text, tokens, no_special, outputs)
    if saved is not None:
        if saved == STDIO:
            raise click.UsageError("--save-logits writes a file; give its name")
        outputs.reads(model_path(name), "the model")
        outputs.writes_stdout()
        outputs.claim(saved, "--save-logits")
    on.wake()
    from ..engine.perplexity import perplexity as measure

    watch = None
    try:
        with ExitStack() as stack:
            bars = stack.enter_context(progress_bars(not on.quiet))
            watch = Watch(bars, "windows")
            file = open_file(name)
            stack.enter_context(file)
            ids, bos = given.ids(file.metadata, name)
            model = stack.enter_context(on.open(file, bars, batch_tokens, ranks=True))
            watch.begin(context * min(len(ids) // max(context, 1), chunks or len(ids)))
            if saved is None:
                measured = measure(model, ids, context, chunks, bos, batch_tokens, watch)
            else:
                measured = _save(model, ids, context, chunks, bos, batch_tokens, watch, outputs, saved)
            if on.verbose:
                say_loaded(model)
                say_batches(model, batch_tokens)
    except Interrupted:
        if watch is not None and watch.done:
            on.say(
                f"interrupted: {watch.done:.0%} of the text was scored; the figure needs all of it (--chunks N: less)"
            )
        raise
    on.say_summary(f"{measured.n_tokens} tokens of {measured.windows} windows of {context}, {how_it_ran(model)}")
    if as_json:
        described = {
            "perplexity": measured.value,
            "stderr": measured.error,
            "n_tokens": measured.n_tokens,
            "windows": measured.windows,
            "context": context,
            "model": name,
            "backend": model.backend.name,
            "precision": model.precision,
        }
        print_object(json_value(described))
    else:
        click.echo(f"PPL = {measured.value:.4f} +/- {measured.error:.5f}")


def _save(
    model: Model,
    ids: list[int],
    context: int,
    chunks: int | None,
    bos: int | None,
    batch_tokens: int | None,
    watch: Watch,
    outputs: Outputs,
    path: str,
) -> Perplexity:
    """The Perplexity, of the log-probabilities that --save-logits writes."""
    from ..engine.logits_file import file_size, save_logits
    from ..engine.windows import Windows

    windows = Windows.of(ids, context, chunks, bos, [model])
    needed, room = file_size(windows, model.config.vocab_size), free_room(path)
    if room is not None and needed > room:
        raise InputError(
            f"--save-logits {path}: it takes {size(needed)}, and {size(room)} are free there: give fewer --chunks, or "
            "compare with `kqprefill kld --against`, which writes nothing"
        )
    with outputs.open(path, "--save-logits") as file:
        return save_logits(model, windows, file, batch_tokens, watch)
