"""kqprefill synth: a benchmark model as a file."""

from __future__ import annotations

import click

from .common import STDIO, output_file


@click.command()
@click.argument("name", metavar="SHAPE:RECIPE")
@click.argument("out", type=click.Path())
def synth(name: str, out: str) -> None:
    """Write a model of a known shape, with random weights.

    Its tensors are valid and its text is noise: for benchmarks, here or in llama.cpp.

    \b
    kqprefill synth tiny:Q4_K_M tiny.gguf
    """
    from ..synthetic import SyntheticFile, write_gguf

    if out == STDIO:
        raise click.UsageError("synth writes a file; give its name")
    model = SyntheticFile.named(name)
    with output_file(out) as file:
        write_gguf(model, file.name)
