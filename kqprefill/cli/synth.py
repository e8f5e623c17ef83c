"""kqprefill synth: a benchmark model as a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from .common import layers_option, refuse_too_large
from .outputs import STDIO, Outputs, force_option, free_room

if TYPE_CHECKING:
    from ..synthetic import SyntheticFile


@click.command()
@click.argument("name", metavar="SHAPE:RECIPE")
@click.argument("out", type=click.Path())
@layers_option
@force_option
def synth(name: str, out: str, layers: int | None, force: bool) -> None:
    """Write a model of a known shape, with random weights.

    Its tensors are valid and its text is noise: for benchmarks, here or in llama.cpp.

    \b
    kqprefill synth tiny:Q4_K_M tiny.gguf
    """
    from ..synthetic import SyntheticFile, write_gguf

    if out == STDIO:
        raise click.UsageError("synth writes a file; give its name")
    model = SyntheticFile.named(name, layers)
    outputs = Outputs(force)
    outputs.claim(out, "OUT")
    _check_room(model, out)
    with outputs.open(out, "OUT") as file:
        write_gguf(model, file.name)


def _check_room(model: SyntheticFile, out: str) -> None:
    """Whether the disk has room for the file, before any of it is made."""
    free = free_room(out)
    if free is not None:
        folder = os.path.dirname(os.path.realpath(out))
        words = f"{out}: {model.path} takes {{needed}}, and {{room}} are free in {folder}"
        refuse_too_large(model, _file_size, free, words)


def _file_size(model: SyntheticFile) -> int:
    return sum(tensor.nbytes for tensor in model.tensors.values())
