"""kqprefill perplexity: of a long text, comparable with llama-perplexity's."""

from __future__ import annotations

from contextlib import ExitStack

import click

from ..backends.wake import wake_gpu
from ..errors import KqprefillError
from ..terminal import json_value
from .common import (
    batch_option,
    device_options,
    has_piped_stdin,
    memory_option,
    open_file,
    open_on,
    print_object,
    read_text_file,
    read_tokens,
    say,
    say_batches,
    say_loaded,
    say_summary,
    special_option,
    volume_options,
)
from .interrupts import Interrupted
from .outputs import STDIO
from .progress import Watch, progress_bars


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.option(
    "-f",
    "--file",
    "text",
    metavar="FILE",
    help="The text, for the model's own tokenizer; `-` is stdin, which is read where it is piped and nothing is named.",
)
@click.option("--tokens", metavar="IDS", help="Token ids instead: `1,2,3`, `-` for stdin, `@FILE`.")
@click.option(
    "-c",
    "--context",
    default=512,
    show_default=True,
    metavar="T",
    envvar="KQPREFILL_CONTEXT",
    show_envvar=True,
    help="Tokens of a window.",
)
@click.option("--chunks", default=None, metavar="N", type=click.IntRange(1), help="Windows at most.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@special_option
@batch_option
@device_options
@memory_option
@volume_options
def perplexity(
    name: str,
    text: str | None,
    tokens: str | None,
    context: int,
    chunks: int | None,
    as_json: bool,
    no_special: bool,
    batch_tokens: int | None,
    backend: str,
    device: int,
    kernels: str,
    vram: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Print the perplexity of a text, and its standard error.

    As llama-perplexity does: windows of --context tokens, of which the second half is scored, each beginning with BOS
    where the file asks for it.

    \b
    kqprefill perplexity examples/tiny-qwen3.gguf --file README.md -c 256
    """
    if text is None and tokens is None and has_piped_stdin():
        text = STDIO
    if (text is None) == (tokens is None):
        raise click.UsageError("give the text either as --file FILE or as --tokens IDS")
    if tokens is not None and no_special:
        raise click.UsageError("--no-special is for a text; --tokens are ids already")
    ids = None if tokens is None else read_tokens(tokens)
    words = None if text is None else read_text_file(text, "--file")
    wake_gpu(backend, device)
    from ..engine.perplexity import perplexity as measure
    from ..text import Tokenizer

    watch = None
    try:
        with ExitStack() as stack:
            bars = stack.enter_context(progress_bars(not quiet))
            watch = Watch(bars, "windows")
            file = open_file(name)
            stack.enter_context(file)
            bos = None
            try:
                tokenizer = Tokenizer(file.metadata, name)
                bos = tokenizer.bos
                if words is not None:
                    ids = tokenizer.encode(words, parse_special=not no_special)
            except KqprefillError:
                if words is not None:
                    raise
            assert ids is not None, "the text is given as --file or as --tokens"
            model = stack.enter_context(
                open_on(file, backend, device, kernels, vram, quiet, bars, batch_tokens, ranks=True)
            )
            watch.begin(context * min(len(ids) // max(context, 1), chunks or len(ids)))
            measured = measure(model, ids, context, chunks, bos, batch_tokens, watch)
            if verbose:
                say_loaded(model)
                say_batches(model, batch_tokens)
    except Interrupted:
        if watch is not None and watch.done and not quiet:
            say(f"interrupted: {watch.done:.0%} of the text was scored; the figure needs all of it (--chunks N: less)")
        raise
    where = f"{model.backend.name} ({model.backend.device_name})"
    say_summary(f"{measured.n_tokens} tokens of {measured.windows} windows of {context}, {where}", quiet, verbose)
    if as_json:
        described = {
            "perplexity": measured.value,
            "stderr": measured.error,
            "n_tokens": measured.n_tokens,
            "windows": measured.windows,
            "context": context,
            "model": name,
            "backend": model.backend.name,
        }
        print_object(json_value(described))
    else:
        click.echo(f"PPL = {measured.value:.4f} +/- {measured.error:.5f}")
