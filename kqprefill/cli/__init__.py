"""The command line: one click command a file. Heavy imports (NumPy, CUDA, rich) wait until a command needs them."""

from __future__ import annotations

import os
import signal
import sys

import click

from .. import __version__
from ..errors import InputError, KqprefillError
from .bench import bench
from .cache import cache
from .completion import completion
from .doctor import doctor
from .inspect import inspect
from .perplexity import perplexity
from .plan import plan
from .records import Terminated, raise_signal
from .run import run
from .score import score
from .synth import synth
from .tokenize import tokenize


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kqprefill")
def cli() -> None:
    """Prefill GGUF language models at the rate of the GPU's matrix units.

    \b
    kqprefill run examples/tiny-qwen3.gguf --tokens 72,101      # the greedy next token
    kqprefill score examples/tiny-qwen3.gguf examples/questions.jsonl   # log-probabilities
    kqprefill bench examples/tiny-qwen3.gguf -p 16,128          # tokens/s by prompt length
    kqprefill plan examples/tiny-qwen3.gguf --vram 8G           # what stays in GPU memory
    kqprefill inspect examples/tiny-qwen3.gguf                  # what the file holds
    """


for command in (run, score, perplexity, bench, plan, inspect, tokenize, synth, doctor, cache, completion):
    cli.add_command(command)


def main() -> None:
    """Entry point. Exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted (SIGINT), 143 when ended
    (SIGTERM)."""
    signal.signal(signal.SIGTERM, raise_signal)
    try:
        status = cli(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        status = done.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except KqprefillError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        click.echo(f"kqprefill: {error}", err=True)
        status = 2 if isinstance(error, InputError) else 1
    except (KeyboardInterrupt, click.Abort):
        status = 130
    except Terminated:
        status = 143
    except MemoryError:
        click.echo(
            "kqprefill: out of memory; a shorter prompt, or logits of the last position only, need less", err=True
        )
        status = 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # there, whoever read our output has gone: say nothing more
            click.echo(f"kqprefill: {error.filename or 'stdout'}: {error.strerror or error}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more on its way out
        status = 1
    sys.stderr.flush()
    # All is written: taking Python and the driver apart piece by piece takes as long as a short prompt.
    os._exit(status or 0)
