"""kqprefill run: one prompt through a model."""

from __future__ import annotations

from contextlib import ExitStack
import json
import math
import sys
from typing import Any

import click

from ..backends.wake import wake_gpu
from ..errors import InputError
from .common import (
    STDIO,
    device_options,
    memory_option,
    output_file,
    progress_bars,
    read_text,
    read_tokens,
    say_loaded,
    say_summary,
    size,
    table,
    volume_options,
    warner,
)


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path())
@click.option("--tokens", metavar="IDS", help="`1,2,3` or `1 2 3`; `-` reads stdin, `@FILE` a file.")
@click.option("--prompt", metavar="TEXT", help="Text, for the file's own tokenizer; `-` reads stdin, `@FILE` a file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the token id.")
@click.option("--text", "as_text", is_flag=True, help="The token's text instead of its id.")
@click.option(
    "--top",
    default=0,
    metavar="K",
    type=click.IntRange(0),
    help="The K likeliest next tokens: a table on a terminal, JSON in a pipe.",
)
@click.option(
    "--logits",
    metavar="FILE",
    help="Write the last position's logits, float32 [V]: .npy, or with the prompt's tokens .npz or .safetensors; "
    "`-` is stdout.",
)
@click.option("--all-positions", is_flag=True, help="With --logits: every position's, float32 [T, V].")
@device_options
@memory_option
@volume_options
def run(
    path: str,
    tokens: str | None,
    prompt: str | None,
    as_json: bool,
    as_text: bool,
    top: int,
    logits: str | None,
    all_positions: bool,
    backend: str,
    device: int,
    kernels: str,
    vram: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Print the greedy next token after a prompt.

    \b
    kqprefill run examples/tiny-qwen3.gguf --tokens 72,101,108,108,111
    kqprefill run examples/tiny-qwen3.gguf --prompt "The capital of France is" --top 5
    """
    if all_positions and logits is None:
        raise click.UsageError("--all-positions says which logits --logits FILE writes; give that too")
    if logits == STDIO and (as_json or top):
        raise click.UsageError(
            f"--logits - and {'--json' if as_json else '--top'} both want stdout; write the logits to a file"
        )
    if (tokens is None) == (prompt is None):
        raise click.UsageError("give the prompt either as --tokens IDS or as --prompt TEXT")
    if as_json and as_text:
        raise click.UsageError("--json and --text both say what to print; --json has the text too")
    ids = None if tokens is None else read_tokens(tokens)
    words = None if prompt is None else read_text(prompt, "--prompt")
    if logits == "":
        raise InputError("--logits: the file name is empty")
    wake_gpu(backend, device)
    import numpy as np

    from ..engine.model import open_model
    from ..gguf import GGUFFile

    with ExitStack() as stack:
        # The output is opened before the work, so that a path that can't be written costs no time.
        output = stack.enter_context(output_file(logits)) if logits is not None else None
        progress = stack.enter_context(progress_bars(not quiet))
        file = stack.enter_context(GGUFFile(path))
        if ids is None:
            from ..text import Tokenizer

            assert words is not None, "the prompt is given as --tokens or as --prompt"
            ids = Tokenizer(file.metadata, file.path).encode(words)
            if not ids:
                raise InputError("--prompt: the prompt is empty")
        model = stack.enter_context(
            open_model(file, backend, device, kernels, progress, warner(quiet), vram, max_tokens=len(ids))
        )
        if top > model.config.vocab_size:
            raise InputError(f"--top {top}: the vocabulary has {model.config.vocab_size} tokens")
        wanted = "all" if all_positions else "last" if top or output is not None else None
        result = model.prefill(ids, logits=wanted, progress=progress)
        if output is not None:
            from .arrays import write_arrays

            assert logits is not None and result.logits is not None
            write_arrays(output, logits, {"logits": result.logits, "tokens": np.array(ids, np.int32)})
        timings = {**model.timings, **result.timings}
        held = model.backend.memory_used()
        summary = (
            f"{result.prompt_tokens} tokens, {result.prompt_tokens / timings['prefill']:.0f} tokens/s, "
            f"load {timings['load']:.2f} s, {model.backend.name} ({model.backend.device_name})"
            + (f", {size(held)} of GPU memory" if held is not None else "")
        )
        token = result.token
        assert token is not None, "the prompt has tokens"
        described: dict[str, Any] = {
            "token": token,
            "text": model.token_text(token) if as_json or as_text else None,
            "logit": result.logit,
            "logprob": result.logprob,
            "prompt_tokens": result.prompt_tokens,
            "model": path,
            "backend": model.backend.name,
            "device": model.backend.device_name,
            "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
        }
        likeliest: list[dict[str, Any]] = [
            {
                "token": next_token,
                "text": model.token_text(next_token),
                "logprob": logprob,
                "probability": math.exp(logprob),
            }
            for next_token, logprob in (result.likeliest(top) if top else ())
        ]
        if verbose:
            say_loaded(model)
    say_summary(summary, quiet, verbose)
    if top:
        described["top"] = likeliest
    if as_json:
        click.echo(json.dumps(described, ensure_ascii=False))
    elif top and sys.stdout.isatty():
        cells = [
            [
                f"{100 * t['probability']:.2f}%",
                f"{t['logprob']:.4f}",
                str(t["token"]),
                json.dumps(t["text"], ensure_ascii=False),
            ]
            for t in likeliest
        ]
        click.echo(table(["", "log-probability", "token", "text"], cells))
    elif top:
        click.echo(json.dumps(likeliest, ensure_ascii=False))
    elif logits != STDIO:
        click.echo(described["text"] if as_text and described["text"] is not None else token)
