"""kqprefill perplexity: of a long text, comparable with llama-perplexity's."""

from __future__ import annotations

from contextlib import ExitStack
import json
import math

import click

from ..backends.wake import wake_gpu
from ..errors import KqprefillError
from .common import (
    batch_option,
    device_options,
    memory_option,
    open_file,
    progress_bars,
    read_text,
    read_tokens,
    say_loaded,
    say_summary,
    volume_options,
    warner,
)


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.option("--file", "text", metavar="FILE", help="The text, for the file's own tokenizer; `-` reads stdin.")
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
    batch_tokens: int,
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
    if (text is None) == (tokens is None):
        raise click.UsageError("give the text either as --file FILE or as --tokens IDS")
    ids = None if tokens is None else read_tokens(tokens)
    words = None if text is None else read_text(text if text == "-" else f"@{text}", "--file")
    wake_gpu(backend, device)
    from ..engine.model import open_model
    from ..engine.perplexity import perplexity as measure
    from ..text import Tokenizer

    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars(not quiet))
        file = open_file(name)
        stack.enter_context(file)
        bos = None
        try:
            tokenizer = Tokenizer(file.metadata, name)
            bos = tokenizer.bos
            if words is not None:
                ids = tokenizer.encode(words)
        except KqprefillError:
            if words is not None:
                raise
        assert ids is not None, "the text is given as --file or as --tokens"
        model = stack.enter_context(
            open_model(
                file, backend, device, kernels, progress, warner(quiet), vram, max_tokens=batch_tokens, ranks=True
            )
        )

        measured = measure(model, ids, context, chunks, bos, batch_tokens, progress)
        if math.isnan(measured.value):
            raise KqprefillError("the logits hold NaN: the file's weights are damaged or out of range")
        if verbose:
            say_loaded(model)
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
        click.echo(json.dumps(described, ensure_ascii=False))
    else:
        click.echo(f"PPL = {measured.value:.4f} +/- {measured.error:.5f}")
