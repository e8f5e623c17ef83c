"""kqprefill run: one prompt through a model."""

from __future__ import annotations

from contextlib import ExitStack
import json
import math
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import InputError
from ..terminal import print_json, print_text
from .arrays import check_arrays_path
from .common import (
    has_piped_stdin,
    how_it_ran,
    print_object,
    read_template,
    read_text,
    read_text_file,
    read_tokens,
    say_loaded,
    size,
    special_option,
    table,
    template_option,
)
from .outputs import STDIO, Outputs, force_option
from .progress import progress_bars
from .run_options import RunOptions, run_options
from .sources import from_home, model_path
from .states import States, state_options, states_of

if TYPE_CHECKING:
    from ..core import Progress
    from ..engine.model import Model
    from ..engine.prefill import Prefill
    from ..gguf import GGUFFile


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path())
@click.option("--tokens", metavar="IDS", help="`1,2,3` or `1 2 3`; `-` reads stdin, `@FILE` a file.")
@click.option(
    "-p", "--prompt", metavar="TEXT", help="Text, for the model's own tokenizer; `-` reads stdin, `@FILE` a file."
)
@click.option("-f", "--file", metavar="FILE", help="The prompt's text is in FILE, as with --prompt @FILE.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message, for the model's chat template.")
@template_option
@special_option
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
@state_options
@force_option
@run_options
def run(
    path: str,
    tokens: str | None,
    prompt: str | None,
    file: str | None,
    chat: bool,
    chat_template: str | None,
    no_special: bool,
    as_json: bool,
    as_text: bool,
    top: int,
    logits: str | None,
    all_positions: bool,
    force: bool,
    on: RunOptions,
    **state: Any,
) -> None:
    """Print the greedy next token after a prompt.

    Where no prompt is given, stdin is its text if something is piped into it.

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
    if as_text and top:
        raise click.UsageError("--top and --text both say what to print; --top shows texts too")
    if as_json and as_text:
        raise click.UsageError("--json and --text both say what to print; --json has the text too")
    states = states_of(**state)
    goes_on = states.load is not None
    if tokens is None and prompt is None and file is None and has_piped_stdin():
        prompt = STDIO
    if goes_on and chat:
        raise click.UsageError("--chat writes a conversation from its beginning; with --load-state give what follows")
    if all_positions and states.save is not None:
        raise click.UsageError("--all-positions and --save-state: ask for them in two runs")
    if not (goes_on and tokens is prompt is file is None) and [tokens, prompt, file].count(None) != 2:
        raise click.UsageError("give the prompt once: --tokens IDS, --prompt TEXT, --file FILE, or piped into stdin")
    if tokens is not None and (chat or no_special):
        raise click.UsageError(f"{'--chat' if chat else '--no-special'} is for a text; --tokens are ids already")
    if chat_template is not None and not chat:
        raise click.UsageError("--chat-template says how --chat writes the prompt; give that too")
    outputs = Outputs(force)
    if logits is not None or states.save is not None:
        if logits is not None:
            check_arrays_path(logits, "--logits")
        outputs.reads(model_path(path), "the model")
        outputs.reads_text(tokens, "--tokens")
        outputs.reads_text(prompt, "--prompt")
        if file is not None:
            outputs.reads(from_home(file), "the file of --file")
        if chat_template is not None:
            outputs.reads(from_home(chat_template), "the file of --chat-template")
        if states.load is not None:
            outputs.reads(from_home(states.load), "the state of --load-state")
        outputs.writes_stdout()
        if logits is not None and logits != STDIO:
            outputs.claim(logits, "--logits")
        if states.save is not None:
            outputs.claim(states.save, "--save-state")
    ids = None if tokens is None else read_tokens(tokens)
    words = None if prompt is None else read_text(prompt, "--prompt", may_be_empty=goes_on)
    if file is not None:
        words = read_text_file(file, "--file", may_be_empty=goes_on)
    template = read_template(chat_template)
    on.wake()
    import numpy as np

    from ..gguf import GGUFFile

    with ExitStack() as stack:
        # The output is opened before the work, so that a path that can't be written costs no time.
        output = stack.enter_context(outputs.open(logits, "--logits")) if logits is not None else None
        kept = stack.enter_context(outputs.open(states.save, "--save-state")) if states.save is not None else None
        progress = stack.enter_context(progress_bars(not on.quiet))
        source = stack.enter_context(GGUFFile(model_path(path)))
        if ids is None:
            ids = [] if words is None else _encoded(source, words, chat, template, not no_special, not goes_on)
            if not ids and not goes_on:
                raise InputError("the prompt is empty; give some text")
        model = stack.enter_context(on.open(source, progress, len(ids)))
        if top > model.config.vocab_size:
            raise InputError(f"--top {top}: the vocabulary has {model.config.vocab_size} tokens")
        wanted = "all" if all_positions else "last" if top or output is not None else None
        result = _prefill(model, states, kept, ids, wanted, progress)
        if output is not None:
            from .arrays import write_arrays

            assert logits is not None and result.logits is not None
            write_arrays(output, logits, {"logits": result.logits, "tokens": np.array(ids, np.int32)})
        timings = {**model.timings, **result.timings}
        held = model.backend.memory_used()
        summary = (
            f"{result.prompt_tokens} tokens, {result.prompt_tokens / timings['prefill']:.0f} tokens/s, "
            f"load {timings['load']:.2f} s, {how_it_ran(model)}"
            + (f", {size(held)} of GPU memory" if held is not None else "")
        )
        if states.save is not None:
            summary += f", the state written in {timings['state']:.2f} s more"
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
            "precision": model.precision,
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
        if on.verbose:
            say_loaded(model)
    on.say_summary(summary)
    if top:
        described["top"] = likeliest
    if as_json:
        print_object(described)
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
        print_text(table(["share", "log-probability", "token", "text"], cells))
    elif top:
        print_json(likeliest)
    elif logits != STDIO:
        print_text(described["text"] if as_text and described["text"] is not None else token)


def _prefill(
    model: Model,
    states: States,
    kept: BinaryIO | None,
    ids: list[int],
    logits: str | None,
    progress: Progress | None | None,
) -> Prefill:
    """Run the prompt, perhaps after a state that is loaded, and perhaps save the one that it leaves."""
    cache = None
    if states.load is not None:
        cache, first = model.load_state(from_home(states.load), room=len(ids))
        ids = first + ids
        if not ids:
            raise InputError(f"--load-state {states.load}: a state has no logits; give at least one token that follows")
    if kept is None:
        return model.prefill(ids, logits=logits, cache=cache, progress=progress)
    return model.save_state(kept, ids, cache, logits, progress, states.hold_back, **states.options)


def _encoded(
    source: GGUFFile, words: str, chat: bool, template: str | None, parse_special: bool, add_special: bool
) -> list[int]:
    """The prompt's ids: of a text, or of the beginning of an answer to a user's message."""
    from ..text import Tokenizer

    tokenizer = Tokenizer(source.metadata, source.path)
    if not chat:
        return tokenizer.encode(words, add_special, parse_special)
    from ..text.chat import Chat

    if not words:
        raise InputError("the message is empty; give some text")
    with Chat(tokenizer, source.metadata, source.path, template) as own:
        return own.encoder([{"role": "user", "content": words}], True, parse_special)("")
