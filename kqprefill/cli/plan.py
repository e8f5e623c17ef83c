"""kqprefill plan: what of a model stays in GPU memory and what is streamed, before anything is loaded."""

from __future__ import annotations

import json

import click

from ..errors import InputError
from .common import kernels_option, memory_option, open_file, plan_lines, size


@click.command()
@click.argument("model", metavar="MODEL|SHAPE:RECIPE")
@click.option("-p", "--prompt", "tokens", default=4096, show_default=True, metavar="T", help="Tokens of the prompt.")
@click.option(
    "--device", default=0, metavar="N", envvar="KQPREFILL_DEVICE", show_envvar=True, help="CUDA device number."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, sizes in bytes.")
@kernels_option
@memory_option
def plan(model: str, tokens: int, device: int, as_json: bool, kernels: str, vram: str | None) -> None:
    """Say what would stay in GPU memory.

    Where a model's weights would live, what takes GPU memory, and what bounds the speed.

    With a GPU, its bus is measured and its free memory is the budget; without one, give --vram.

    \b
    kqprefill plan qwen3-32b:Q4_K_M --vram 8G -p 8192
    """
    from ..backends.budget import Budget
    from ..backends.cuda.bounds import H100, estimate
    from ..backends.cuda.device.gpu import Gpu, GpuFacts
    from ..backends.cuda.kernel_set import kernel_set_of
    from ..backends.cuda.rehearsal import plan_model
    from ..backends.cuda.weights.plan import budget_of
    from ..errors import BackendError
    from ..models import read_model

    with open_file(model) as file:
        family = read_model(file)
        if not 0 < tokens <= family.config.context_length:
            raise InputError(f"-p {tokens}: the model's context is 1 to {family.config.context_length} tokens")
        budget = None if vram is None else Budget.parse(vram)
        try:
            gpu = Gpu(device)
        except BackendError as error:
            if budget is None or budget.is_share:
                raise BackendError(
                    f"{error}; without a GPU, say how much memory to plan for, such as --vram 8G"
                ) from None
            facts: GpuFacts = H100
            may_take, name = budget.of(0), "no GPU here: an H100 is assumed"
        else:
            facts, may_take, name = gpu, budget_of(gpu, budget), gpu.name
        kernel_set = kernel_set_of(facts.capability, kernels)
        made = plan_model(family, facts, kernel_set, may_take, tokens)
        bounds = estimate(made, family, facts, kernel_set)
    if as_json:
        described = {
            "model": model,
            "device": name,
            "budget_bytes": made.budget,
            "planned_bytes": made.nbytes,
            "parts": made.parts,
            "prompt_tokens": tokens,
            "layers": len(family.blocks),
            "resident_layers": list(made.resident),
            "streamed_layers": list(made.streamed),
            "streamed_bytes": made.streamed_bytes,
            **bounds,
        }
        click.echo(json.dumps(described))
        return
    click.echo(f"{model} on {name}, prompts of {tokens} tokens")
    for line in plan_lines(made, family):
        click.echo(line)
    arithmetic = f"arithmetic {bounds['compute_seconds']:.3f} s at {bounds['tflops']:.0f} TFLOP/s"
    if not made.streamed:
        click.echo(f"bound by arithmetic: {arithmetic}")
        return
    bus = f"bus {bounds['bus_seconds']:.3f} s at {bounds['bus_gb_per_s']:.1f} GB/s"
    which = "the bus" if bounds["bus_seconds"] > bounds["compute_seconds"] else "arithmetic"
    click.echo(f"bound by {which}: {arithmetic}, {bus} ({size(made.streamed_bytes)} streamed for each prompt)")
    click.echo(f"streaming is free from about {bounds['free_from_tokens']} tokens")
