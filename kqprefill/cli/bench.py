"""kqprefill bench: tokens/s by prompt length, in the table that llama-bench's users know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
import csv
import io
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import InputError
from ..terminal import print_json, print_text, shown
from .common import (
    layers_option,
    open_file,
    parameters,
    read_lengths,
    refuse_too_large,
    say_loaded,
    size,
    table,
)
from .outputs import Outputs, force_option
from .plot import check_plot, draw
from .progress import Bars, progress_bars
from .run_options import RunOptions, run_options
from .sources import model_path

if TYPE_CHECKING:
    from ..gguf import ModelFile
    from ..timeline import Stage

# Runs; on a GPU the first compiles and work arrays grow, the second finds them where they stay, and the third makes the
# CUDA graph of a short prompt.
_WARM_UP = 3


def _seconds_option(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option of so many seconds, 0 if it is not given. text: its help."""

    def finite(context: click.Context, option: click.Parameter, value: float) -> float:
        if not math.isfinite(value):
            raise click.BadParameter("it is no number of seconds")
        return value

    return click.option(
        name, default=0.0, metavar="SECONDS", type=click.FloatRange(0, 3600), callback=finite, help=text
    )


@click.command()
@click.argument("name", metavar="MODEL|SHAPE:RECIPE")
@click.option(
    "-p",
    "--prompt",
    "lengths",
    default=["512"],
    show_default=True,
    multiple=True,
    metavar="T,T,…",
    help="Prompt lengths; may be given several times.",
)
@click.option("-r", "--repetitions", default=5, show_default=True, type=click.IntRange(1))
@_seconds_option(
    "--delay",
    "Pause before each repetition: what one prompt takes on a rested GPU, where its power limit slows one after "
    "another.",
)
@_seconds_option(
    "--warm-up",
    "Run each length for so long before it is measured, and three times at least: what short prompts take once a GPU "
    "has worked for a while, with its clocks, and its power limit, as they stay.",
)
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", show_default=True)
@click.option(
    "--detail", is_flag=True, help="Also time by stage, with TFLOP/s and the GB/s of reading each weight once."
)
@click.option(
    "--plot", "picture", metavar="FILE.png", help="Also draw tokens/s by prompt length, beside what the GPU allows."
)
@layers_option
@force_option
@run_options
def bench(
    name: str,
    lengths: tuple[str, ...],
    repetitions: int,
    delay: float,
    warm_up: float,
    output: str,
    detail: bool,
    picture: str | None,
    layers: int | None,
    force: bool,
    on: RunOptions,
) -> None:
    """Measure prefill speed by prompt length.

    Mean and standard deviation of tokens/s, warm-up excluded.

    MODEL is a GGUF file, or a SHAPE:RECIPE such as qwen3-8b:Q4_K_M, which is made in memory with random weights.
    Layers share theirs, so that a model of 400 GB takes 11. With --layers, between which rates the whole model's would
    be is also said.

    \b
    kqprefill bench examples/tiny-qwen3.gguf -p 16,128
    """
    prompt_lengths = read_lengths(lengths, "-p")
    import statistics

    outputs = Outputs(force)
    if picture:
        kind = check_plot(picture)
        outputs.reads(model_path(name), "the model")
        outputs.writes_stdout()
        outputs.claim(picture, "--plot")
    on.wake()
    import numpy as np

    rows: list[dict[str, Any]] = []
    opened: AbstractContextManager[BinaryIO | None] = outputs.open(picture, "--plot") if picture else nullcontext()
    with (
        opened as picture_file,
        progress_bars(not on.quiet) as bars,
        on.open(_open(name, layers), bars, max(prompt_lengths)) as model,
    ):
        config = model.config
        for length in prompt_lengths:
            if not 0 < length <= config.context_length:
                raise InputError(f"-p {length}: the model's context is 1 to {config.context_length} tokens")
        matrices = model.family.matrices()
        if on.verbose:
            say_loaded(model)
        watch = _Watch(bars, (_WARM_UP + repetitions) * len(prompt_lengths), model.backend.name == "cpu")
        for length in prompt_lengths:
            tokens = np.random.default_rng(length).integers(0, config.vocab_size, length)
            watch.note, begun = f"pp{length}, warming up", time.perf_counter()
            for _ in range(_WARM_UP):
                model.prefill(tokens, progress=watch.layers)
                watch.end_run()
            while time.perf_counter() - begun < warm_up:
                model.prefill(tokens, progress=watch.layers)
            rates = []
            for _ in range(repetitions):
                time.sleep(delay)
                done = model.prefill(tokens, progress=watch.layers if watch.always else None)
                rates.append(length / done.timings["prefill"])
                watch.note = f"pp{length}, {rates[-1]:.0f} tokens/s"
                watch.end_run()
            rows.append(
                {
                    "model": str(model.file.metadata.get("general.name") or os.path.basename(name)),
                    "size_bytes": sum(w.tensor.nbytes for w in matrices),
                    "parameters": sum(math.prod(w.shape) for w in matrices),
                    "backend": model.backend.name,
                    "device": model.backend.device_name,
                    "precision": model.precision,
                    "prompt_tokens": length,
                    "repetitions": repetitions,
                    "delay_seconds": delay,
                    "warm_up_seconds": warm_up,
                    "tokens_per_second": statistics.mean(rates),
                    "tokens_per_second_stddev": statistics.stdev(rates) if repetitions > 1 else 0.0,
                    **_of_whole(model.file, statistics.mean(rates)),
                }
            )
            if detail:
                rows[-1]["stages"] = _stages(model.prefill(tokens, timed=True).stages or {})
        if picture_file is not None:
            draw(rows, model.backend.floors(model.family), picture_file, kind)
    _PRINTERS[output](rows)


def _open(name: str, layers: int | None) -> ModelFile:
    """The model; refused where its random weights have no room in half of the free memory (the CPU takes the other)."""
    from ..backends.budget import free_host_memory
    from ..synthetic import SyntheticFile

    file = open_file(name, layers)
    if isinstance(file, SyntheticFile):
        words = f"{file.path}: its weights take {{needed}} of main memory, and half of what is free is {{room}}"
        refuse_too_large(file, SyntheticFile.memory, free_host_memory() // 2, words)
    return file


def _of_whole(file: ModelFile, rate: float) -> dict[str, Any]:
    """For some layers of a model: how many of how many, and between which rates the whole model's would be. Its time is
    as many times theirs as it has layers, or bytes of layers' weights: first layers without experts have few bytes."""
    from ..synthetic import SyntheticFile

    if not isinstance(file, SyntheticFile) or file.whole is None:
        return {}
    shares = file.shares()
    layers, whole = file.block_count, file.whole.block_count
    return {
        "layers": layers,
        "whole_layers": whole,
        "whole_tokens_per_second_least": rate * min(shares) if shares else None,
        "whole_tokens_per_second_most": rate * max(shares) if shares else None,
    }


class _Watch:
    """A bar over all runs, which moves by layer where that cannot be noticed in what is measured."""

    def __init__(self, bars: Bars | None, runs: int, always: bool) -> None:
        self._bars, self._runs, self._done = bars, runs, 0
        self.always, self.note = always, ""

    def layers(self, stage: str, done: int, total: int) -> None:
        """A Progress (kqprefill.core) of a run."""
        if self._bars is not None and stage == "prefill":
            self._bars("bench", self._done + done / total, self._runs, self.note)
        elif self._bars is not None:
            self._bars(stage, done, total)

    def end_run(self) -> None:
        """One more run is done."""
        self._done += 1
        if self._bars is not None:
            self._bars("bench", self._done, self._runs, self.note)


def _stages(stages: Mapping[str, Stage]) -> dict[str, dict[str, float | None]]:
    """For each stage: milliseconds and, where it means something, TFLOP/s and GB/s."""
    return {
        name: {
            "ms": 1e3 * stage.seconds,
            "tflops": stage.flops / stage.seconds / 1e12 if stage.flops else None,
            "gb_per_s": stage.weight_bytes / stage.seconds / 1e9 if stage.weight_bytes else None,
        }
        for name, stage in stages.items()
    }


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The table that llama-bench's users know; on a terminal, what is the same for all rows stands above it."""
    same = {
        "model": rows[0]["model"],
        "size": size(rows[0]["size_bytes"]),
        "params": parameters(rows[0]["parameters"]),
        "backend": rows[0]["backend"],
        "device": rows[0]["device"],
        "precision": rows[0]["precision"],
    }
    lines = [
        [f"pp{row['prompt_tokens']}", f"{row['tokens_per_second']:.2f} ± {row['tokens_per_second_stddev']:.2f}"]
        for row in rows
    ]
    if sys.stdout.isatty():
        above = "\n".join(f"{name:10}{shown(value)}" for name, value in same.items())
        speeds = above + "\n\n" + table(["test", "t/s"], lines)
    else:
        speeds = table([*same, "test", "t/s"], [[*same.values(), *line] for line in lines])
    if "whole_layers" in rows[0]:
        speeds += "\n\n" + _whole_model(rows)
    if "stages" not in rows[0]:
        return speeds
    head = ["test", "stage", "ms", "share", "TFLOP/s", "GB/s of weights"]
    lines = []
    for row in rows:
        total = sum(stage["ms"] for stage in row["stages"].values())
        for name, stage in row["stages"].items():
            rates = [
                "" if stage[key] is None else f"{stage[key]:.{0 if stage[key] >= 100 else 2}f}"
                for key in ("tflops", "gb_per_s")
            ]
            share = f"{100 * stage['ms'] / total:.1f}%"
            lines.append([f"pp{row['prompt_tokens']}", name, f"{stage['ms']:.2f}", share, *rates])
    return speeds + "\n\n" + table(head, lines)


def _whole_model(rows: list[dict[str, Any]]) -> str:
    """What is said of the whole model where some of its layers were measured."""
    first, whole = (rows[0][key] for key in ("layers", "whole_layers"))
    if rows[0]["whole_tokens_per_second_least"] is None:
        return f"The first {first} of {whole} layers are not of all the model's kinds: nothing is said of the whole."
    rates = [
        f"pp{row['prompt_tokens']} {row['whole_tokens_per_second_least']:.2f} to "
        f"{row['whole_tokens_per_second_most']:.2f} t/s"
        for row in rows
    ]
    return f"All {whole} layers, extrapolated from these {first}: {', '.join(rates)}"


def _csv(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        for name, stage in row.pop("stages", {}).items():
            row.update({f"{name}_{key}": value for key, value in stage.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _print_jsonl(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print_json(row)


_PRINTERS: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    "md": lambda rows: print_text(_markdown(rows)),
    "json": lambda rows: print_json(rows, indent=2),
    "jsonl": _print_jsonl,
    "csv": lambda rows: print_text(_csv(rows)),
}
