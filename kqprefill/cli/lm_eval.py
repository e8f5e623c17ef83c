"""kqprefill lm-eval: lm-evaluation-harness, with kqprefill as its model."""

from __future__ import annotations

from importlib import import_module
import sys

import click

from ..errors import InputError, KqprefillError

_COMMANDS = ("run", "ls", "validate")  # of the harness
_NAME = "kqprefill"


@click.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS…")
@click.pass_context
def lm_eval(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness with a GGUF model.

    ARGUMENTS are the harness' own; its model is kqprefill:

    \b
    --model_args path=model.gguf,vram=8G --tasks hellaswag,wikitext

    After path may follow backend, kernels, vram, precision, batch_tokens, max_length, add_bos_token and
    prefix_token_id. Tasks that have text written (generate_until) are refused.

    \b
    kqprefill lm-eval run --help                                # the harness' options
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        click.echo(context.get_help())
        return
    given = list(arguments if arguments[0] in _COMMANDS else ("run", *arguments))
    if given[0] == "run":
        _have_our_model(given)
    try:
        harness, registry = import_module("lm_eval.__main__"), import_module("lm_eval.api.registry")
        ours = import_module("kqprefill.lm_eval")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "tqdm"):
            raise
        raise InputError("lm-eval needs lm-evaluation-harness: pip install 'kqprefill[lm-eval]'") from None
    if _NAME not in registry.MODEL_REGISTRY:
        registry.register_model(_NAME)(ours.KqprefillLM)
    before, sys.argv = sys.argv, ["kqprefill lm-eval", *given]
    try:
        harness.cli_evaluate()
    except KqprefillError:
        raise
    except Exception as error:
        raise KqprefillError(
            f"lm-evaluation-harness: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        sys.argv = before


def _have_our_model(arguments: list[str]) -> None:
    """Add --model to arguments of the harness' `run`, in place. Raises click's UsageError where they name another."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--model", "-M"):
            value = value if equals else arguments[at + 1] if at + 1 < len(arguments) else ""
            if value != _NAME:
                raise click.UsageError(f"--model {value}: here it is {_NAME}; leave it out, or use lm_eval itself")
            return
    arguments[1:1] = ["--model", _NAME]
