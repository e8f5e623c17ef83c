"""All commands, and the rule that an option is given once."""

from __future__ import annotations

from collections import Counter

import click

from .. import __version__
from .bench import bench
from .cache import cache
from .completion import completion
from .doctor import doctor
from .embed import embed
from .imatrix import imatrix
from .inspect import inspect
from .kld import kld
from .lm_eval import lm_eval
from .perplexity import perplexity
from .plan import plan
from .rerank import rerank
from .run import run
from .score import score
from .serve import serve
from .synth import synth
from .tokenize import tokenize


class _Group(click.Group):
    """Refuses an option that is given twice, of which click would take the last without a word."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_repeated(command, click.Context(command, ctx, name), rest)
        return name, command, rest


def _refuse_repeated(command: click.Command, context: click.Context, args: list[str]) -> None:
    try:
        _, _, order = command.make_parser(context).parse_args(list(args))
    except click.UsageError:  # which is reported when click itself reads them
        return
    for option, times in Counter(order).items():
        if isinstance(option, click.Option) and not (option.multiple or option.is_flag) and times > 1:
            raise click.UsageError(f"{option.opts[-1]} is given {times} times; give it once", context)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kqprefill")
def cli() -> None:
    """Prefill GGUF language models at the rate of the GPU's matrix units.

    A MODEL is a file, or one in a local store: hf:OWNER/REPO[:QUANT] (Hugging Face's), ollama:NAME[:TAG].

    \b
    kqprefill run examples/tiny-qwen3.gguf --tokens 72,101      # the greedy next token
    kqprefill score examples/tiny-qwen3.gguf examples/questions.jsonl   # log-probabilities
    kqprefill bench examples/tiny-qwen3.gguf -p 16,128          # tokens/s by prompt length
    kqprefill plan examples/tiny-qwen3.gguf --vram 8G           # what stays in GPU memory
    kqprefill inspect examples/tiny-qwen3.gguf                  # what the file holds
    """


for command in (
    run,
    score,
    perplexity,
    kld,
    lm_eval,
    embed,
    rerank,
    imatrix,
    serve,
    bench,
    plan,
    inspect,
    tokenize,
    synth,
    doctor,
    cache,
    completion,
):
    cli.add_command(command)
