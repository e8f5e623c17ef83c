"""kqprefill perplexity: of a long text, comparable with llama-perplexity's."""

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
@click.argument("model", type=click.Path())
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
    model, text, tokens, context, chunks, as_json, batch_tokens, backend, device, kernels, vram, quiet, verbose
):
    """Print the perplexity of a text, and its standard error.

    As llama-perplexity does: windows of --context tokens, of which the second half is scored, each beginning with BOS where
    the file asks for it.

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
        file = stack.enter_context(open_file(model))
        try:
            tokenizer = Tokenizer(file.metadata, model)
        except KqprefillError:
            if words is not None:
                raise
            tokenizer = None
        if ids is None:
            ids = tokenizer.encode(words)
        loaded = stack.enter_context(
            open_model(
                file, backend, device, kernels, progress, warner(quiet), vram, max_tokens=batch_tokens, ranks=True
            )
        )

        found = measure(loaded, ids, context, chunks, tokenizer and tokenizer.bos, batch_tokens, progress)
        if math.isnan(found.value):
            raise KqprefillError("the logits hold NaN: the file's weights are damaged or out of range")
        if verbose:
            say_loaded(loaded)
    where = f"{loaded.backend.name} ({loaded.backend.device_name})"
    say_summary(f"{found.n_tokens} tokens of {found.windows} windows of {context}, {where}", quiet, verbose)
    if as_json:
        described = {
            "perplexity": found.value,
            "stderr": found.error,
            "n_tokens": found.n_tokens,
            "windows": found.windows,
            "context": context,
            "model": model,
            "backend": loaded.backend.name,
        }
        click.echo(json.dumps(described, ensure_ascii=False))
    else:
        click.echo(f"PPL = {found.value:.4f} +/- {found.error:.5f}")
