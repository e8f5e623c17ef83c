"""kqprefill plan: what of a model stays in GPU memory and what is streamed, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from ..terminal import print_text
from .common import (
    layers_option,
    open_file,
    plan_lines,
    print_object,
    read_lengths,
    size,
    wrapped,
)
from .plan_devices import described_plan, planned_gpus, print_pipeline
from .run_options import device_options, memory_option, precision_option, say_ignored

if TYPE_CHECKING:
    from ..models.family import Family


@click.command()
@click.argument("model", metavar="MODEL|SHAPE:RECIPE")
@click.option("-p", "--prompt", "length", default="4096", show_default=True, metavar="T", help="Tokens of the prompt.")
@layers_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, sizes in bytes.")
@device_options
@memory_option
@precision_option
def plan(
    model: str,
    length: str,
    layers: int | None,
    as_json: bool,
    backend: str,
    device: str,
    kernels: str,
    vram: str | None,
    precision: str,
) -> None:
    """Say what would stay in GPU memory.

    Where a model's weights would live, what takes GPU memory, and what bounds the speed.

    With a GPU, its bus is measured and its free memory is the budget; without one, give --vram. With several (--device
    0,1,2,3): which layers each of them runs, and how work flows through them. With --backend cpu: what the CPU takes,
    where nothing is planned.

    \b
    kqprefill plan qwen3-32b:Q4_K_M --vram 8G -p 8192
    """
    from ..backends import precision_called
    from ..backends.budget import Budget
    from ..backends.cuda.batch_size import choose_batch
    from ..backends.cuda.bounds import Speed, estimate, free_from
    from ..backends.cuda.kernel_set import kernel_set_of
    from ..backends.cuda.rehearsal import plan_model
    from ..errors import BackendError
    from ..models import read_model

    tokens, *more = read_lengths([length], "-p")
    if more:
        raise click.UsageError(f"-p {length}: a plan is for one length")
    with open_file(model, layers) as file:
        model = file.path if layers else model
        family = read_model(file)
        if not 0 < tokens <= family.config.context_length:
            raise InputError(f"-p {tokens}: the model's context is 1 to {family.config.context_length} tokens")
        if backend == "cpu":
            _plan_cpu(model, family, tokens, precision, as_json)
            return
        how = precision_called(precision)
        gpus = planned_gpus(device, None if vram is None else Budget.parse(vram))
        if len(gpus) > 1:
            print_pipeline(model, family, gpus, kernels, tokens, how, as_json)
            return
        facts, may_take, name = gpus[0].facts, gpus[0].budget, gpus[0].name
        kernel_set = kernel_set_of(facts.capability, kernels)
        plan = partial(plan_model, family, facts, kernel_set, may_take, precision=how)
        made, speed = plan(tokens), Speed(family, facts, kernel_set, how)
        bounds: dict[str, float | None] = {**estimate(made, speed)}
        if made.streamed:
            bounds["free_from_tokens"] = free_from(speed, made, plan)
            try:
                _, batch = choose_batch(speed, lambda n: plan(n, ranks=True))
                bounds["score_batch_tokens"] = batch.tokens
            except BackendError:  # not even the usual batches fit
                bounds["score_batch_tokens"] = None
    if as_json:
        described = {
            "model": model,
            "device": name,
            "precision": precision,
            **described_plan(made),
            "prompt_tokens": tokens,
            "layers": len(family.blocks),
            **bounds,
        }
        print_object(described)
        return
    print_text(wrapped(f"{model} on {name}, {precision}, prompts of {tokens} tokens"))
    for line in plan_lines(made, family):
        click.echo(line)
    for line in _speed_lines(tokens, made.streamed_bytes, bounds):
        click.echo(wrapped(line))


def _speed_lines(tokens: int, streamed_bytes: int, bounds: dict[str, float | None]) -> Iterator[str]:
    """What bounds a prompt's speed, for people; and where that is the bus, what would be faster."""
    arithmetic = f"arithmetic {bounds['compute_seconds']:.3f} s at {bounds['tflops']:.0f} TFLOP/s"
    if not streamed_bytes:
        yield f"bound by arithmetic: {arithmetic}"
        return
    share, free, batch = (bounds[key] for key in ("share_of_resident_rate", "free_from_tokens", "score_batch_tokens"))
    waits = free is None or tokens < free
    bus = f"bus {bounds['bus_seconds']:.3f} s at {bounds['bus_gb_per_s']:.1f} GB/s"
    which = "the bus" if waits else "arithmetic"
    yield f"bound by {which}: {arithmetic}, {bus} ({size(streamed_bytes)} streamed for each prompt)"
    if free is None:
        yield "streaming is free for no prompt that fits this memory and the model's context"
    else:
        yield f"streaming is free from about {free} tokens"
    if waits:
        line = f"a prompt of {tokens} tokens has about {share:.0%} of the rate with all layers on the GPU"
        line += "" if free is None else f"; -p {free} would hide the copies"
        yield line + ("" if batch is None else f"; score and perplexity take batches of {batch} tokens by themselves")


def _plan_cpu(model: str, family: Family, tokens: int, precision: str, as_json: bool) -> None:
    """What the CPU backend takes: nothing is planned there, since the system takes mapped pages back as it needs."""
    say_ignored()
    config = family.config
    weights = sum(tensor.nbytes for name, tensor in family.file.tensors.items() if not family.leaves(name))
    widest = max(weight.shape[-1] for weight in family.matrices())
    parts = {
        "weights": weights,
        "keys, values": 8 * tokens * config.head_count_kv * config.head_dim,  # float32, one layer's
        "activations": 4 * tokens * (2 * config.embedding_length + 3 * widest),
    }
    if as_json:
        about = {"model": model, "device": "cpu", "precision": precision}
        print_object({**about, "parts": parts, "prompt_tokens": tokens})
        return
    print_text(
        wrapped(
            f"{model} on the CPU, {precision}, prompts of {tokens} tokens: nothing is planned there, and no budget is "
            "kept to"
        )
    )
    notes = {"weights": "mapped from the file", "keys, values": "of a layer at a time", "activations": "about"}
    for name, nbytes in parts.items():
        click.echo(f"  {name:12}  {size(nbytes):>10}  {notes[name]}")
