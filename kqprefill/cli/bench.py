"""kqprefill bench: tokens/s by prompt length, in the table that llama-bench's users know."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
import csv
import io
import json
import math
import os
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..backends.wake import wake_gpu
from ..errors import InputError
from .common import (
    device_options,
    memory_option,
    open_file,
    output_file,
    progress_bars,
    say_loaded,
    size,
    table,
    volume_options,
    warner,
)
from .plot import check_plot, draw

if TYPE_CHECKING:
    from ..timeline import Stage

_WARM_UP = 2  # runs; on a GPU the first compiles, and the second makes the CUDA graph of a short prompt


@click.command()
@click.argument("name", metavar="MODEL|SHAPE:RECIPE")
@click.option("-p", "--prompt", "lengths", default="512", show_default=True, metavar="T,T,…", help="Prompt lengths.")
@click.option("-r", "--repetitions", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--delay",
    default=0.0,
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    help="Pause before each repetition: what one prompt takes on a rested GPU, where its power limit slows one after "
    "another.",
)
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", show_default=True)
@click.option(
    "--detail", is_flag=True, help="Also time by stage, with TFLOP/s and the GB/s of reading each weight once."
)
@click.option(
    "--plot", "picture", metavar="FILE.png", help="Also draw tokens/s by prompt length, beside what the GPU allows."
)
@device_options
@memory_option
@volume_options
def bench(
    name: str,
    lengths: str,
    repetitions: int,
    delay: float,
    output: str,
    detail: bool,
    picture: str | None,
    backend: str,
    device: int,
    kernels: str,
    vram: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Measure prefill speed by prompt length.

    Mean and standard deviation of tokens/s, warm-up excluded.

    MODEL is a GGUF file, or a SHAPE:RECIPE such as qwen3-8b:Q4_K_M, which is made in memory with random weights.

    \b
    kqprefill bench examples/tiny-qwen3.gguf -p 16,128
    """
    try:
        prompt_lengths = [int(word) for word in lengths.split(",")]
    except ValueError:
        raise click.BadParameter(f"{lengths!r} is no list of lengths such as 128,512,2048", param_hint="-p") from None
    import statistics

    kind = check_plot(picture) if picture else ""
    wake_gpu(backend, device)
    import numpy as np

    from ..engine.model import open_model

    rows: list[dict[str, Any]] = []
    opened: AbstractContextManager[BinaryIO | None] = output_file(picture) if picture else nullcontext()
    with (
        opened as picture_file,
        progress_bars(not quiet) as progress,
        open_model(
            open_file(name), backend, device, kernels, progress, warner(quiet), vram, max(prompt_lengths)
        ) as model,
    ):
        config = model.config
        for length in prompt_lengths:
            if not 0 < length <= config.context_length:
                raise InputError(f"-p {length}: the model's context is 1 to {config.context_length} tokens")
        matrices = model.family.matrices()
        if verbose:
            say_loaded(model)
        for length in prompt_lengths:
            tokens = np.random.default_rng(length).integers(0, config.vocab_size, length)
            for _ in range(_WARM_UP):
                model.prefill(tokens)
            rates = []
            for _ in range(repetitions):
                time.sleep(delay)
                rates.append(length / model.prefill(tokens).timings["prefill"])
            rows.append(
                {
                    "model": str(model.file.metadata.get("general.name") or os.path.basename(name)),
                    "size_bytes": sum(w.tensor.nbytes for w in matrices),
                    "parameters": sum(math.prod(w.shape) for w in matrices),
                    "backend": model.backend.name,
                    "device": model.backend.device_name,
                    "prompt_tokens": length,
                    "repetitions": repetitions,
                    "delay_seconds": delay,
                    "tokens_per_second": statistics.mean(rates),
                    "tokens_per_second_stddev": statistics.stdev(rates) if repetitions > 1 else 0.0,
                }
            )
            if detail:
                rows[-1]["stages"] = _stages(model.prefill(tokens, timed=True).stages or {})
        if picture_file is not None:
            draw(rows, model.backend.floors(model.family), picture_file, kind)
    click.echo(_FORMATS[output](rows))


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
    head = ["model", "size", "params", "backend", "device", "test", "t/s"]
    lines = [
        [
            row["model"],
            size(row["size_bytes"]),
            f"{row['parameters'] / 1e9:.2f} B",
            row["backend"],
            row["device"],
            f"pp{row['prompt_tokens']}",
            f"{row['tokens_per_second']:.2f} ± {row['tokens_per_second_stddev']:.2f}",
        ]
        for row in rows
    ]
    speeds = table(head, lines)
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


def _csv(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        for name, stage in row.pop("stages", {}).items():
            row.update({f"{name}_{key}": value for key, value in stage.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


_FORMATS = {
    "md": _markdown,
    "json": lambda rows: json.dumps(rows, indent=2),
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "csv": _csv,
}
