"""kqprefill synth: a benchmark model as a file."""

from __future__ import annotations

import click

from .outputs import STDIO, Outputs, force_option


@click.command()
@click.argument("name", metavar="SHAPE:RECIPE")
@click.argument("out", type=click.Path())
@force_option
def synth(name: str, out: str, force: bool) -> None:
    """Write a model of a known shape, with random weights.

    Its tensors are valid and its text is noise: for benchmarks, here or in llama.cpp.

    \b
    kqprefill synth tiny:Q4_K_M tiny.gguf
    """
    from ..synthetic import SyntheticFile, write_gguf

    if out == STDIO:
        raise click.UsageError("synth writes a file; give its name")
    model = SyntheticFile.named(name)
    outputs = Outputs(force)
    outputs.claim(out, "OUT")
    with outputs.open(out, "OUT") as file:
        write_gguf(model, file.name)
