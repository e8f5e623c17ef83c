"""The options of states that are saved, and loaded (docs/handover.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from ..states import FORMATS, TYPES
from .common import Command
from .outputs import STDIO


@dataclass(frozen=True)
class States:
    """What was asked for: files, and how the one to write is written (Model.save_state)."""

    save: str | None
    load: str | None
    hold_back: bool
    options: dict[str, Any]


def state_options(command: Command) -> Command:
    """--save-state, --load-state, and --state-…, which `states_of` reads."""
    for option in reversed(
        (
            click.option("--save-state", metavar="FILE", help="Write the prompt's state, which llama.cpp loads."),
            click.option("--load-state", metavar="FILE", help="Go on from a state: ours, or llama.cpp's."),
            click.option(
                "--state-format",
                type=click.Choice(FORMATS),
                default=FORMATS[0],
                show_default=True,
                help="ggsq: for llama-server and the C API, ggsn: for llama-completion; the version is llama.cpp's.",
            ),
            click.option(
                "--state-type",
                metavar="K[,V]",
                default=TYPES[0],
                show_default=True,
                help=f"The decoder's --cache-type-k and -v: {', '.join(TYPES)}.",
            ),
            click.option("--state-transposed", is_flag=True, help="The decoder's flash attention is off (-fa off)."),
            click.option(
                "--state-cells",
                metavar="N",
                type=click.IntRange(1),
                help="Tokens in a sliding-window cache, at most: with --swa-full, as many as the prompt has.  "
                "[default: the window and 512]",
            ),
            click.option(
                "--state-streams",
                metavar="N",
                type=click.IntRange(1),
                default=1,
                help="The decoder's -np N, without --kv-unified.  [default: 1]",
            ),
            click.option(
                "--state-hold-back",
                is_flag=True,
                help="Leave the last token to the decoder: a recurrent model goes on with the same prompt only so.",
            ),
        )
    ):
        command = option(command)
    return command


def states_of(
    save_state: str | None,
    load_state: str | None,
    state_format: str,
    state_type: str,
    state_transposed: bool,
    state_cells: int | None,
    state_streams: int,
    state_hold_back: bool,
) -> States:
    """What the options say. Raises click.UsageError where they contradict."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = [name for name in context.params if name.startswith("state_")]
    given = [name for name in given if context.get_parameter_source(name) is not default]
    if given and save_state is None:
        raise click.UsageError(f"--{given[0].replace('_', '-')} says how --save-state FILE writes; give that too")
    for name, path in (("--save-state", save_state), ("--load-state", load_state)):
        if path == STDIO:
            raise click.UsageError(f"{name} names a file: a state is not read or written in order")
    types = state_type.split(",")
    if len(types) > 2 or not set(types) <= set(TYPES):
        raise click.UsageError(f"--state-type {state_type}: one of {', '.join(TYPES)}, or two of them, K,V")
    if state_transposed and types[-1] == "q8_0":
        raise click.UsageError("--state-transposed and values in q8_0: llama.cpp has no such cache; choose f16 or f32")
    options = {
        "format": state_format,
        "keys": types[0],
        "values": types[-1],
        "transposed": state_transposed,
        "cells": state_cells,
        "streams": state_streams,
    }
    return States(save_state, load_state, state_hold_back, options)
