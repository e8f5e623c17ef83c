"""The devices of `kqprefill plan`: what is known of them, and the plan of a model that is split over several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING, Any

import click

from ..errors import BackendError
from ..terminal import print_text
from .common import plan_lines, print_object, size, wrapped

if TYPE_CHECKING:
    from ..backends.budget import Budget
    from ..backends.cuda.device.gpu import GpuFacts
    from ..backends.cuda.pipeline.split import Flow
    from ..backends.cuda.weights.plan import Plan
    from ..models.family import Family
    from ..models.precision import Precision


@dataclass(frozen=True)
class PlannedGpu:
    """A GPU, or the H100 that is assumed in its place: its number, bytes that may be taken on it, its name for
    people."""

    number: int
    facts: GpuFacts
    budget: int
    name: str


def planned_gpus(device: str, budget: Budget | None) -> list[PlannedGpu]:
    """The GPUs that --device names. Raises BackendError where one is not there; where there is none at all, and how
    much memory to plan for has not been said."""
    from ..backends.cuda.bounds import H100
    from ..backends.cuda.device.gpu import Gpu, device_count
    from ..backends.cuda.pipeline.split import shared_budget
    from ..backends.cuda.weights.plan import budget_of
    from ..backends.devices import device_numbers

    numbers = device_numbers(device)
    try:
        here = device_count()
    except BackendError as error:
        if budget is None or budget.is_share:
            raise BackendError(f"{error}; without a GPU, say how much memory to plan for, such as --vram 8G") from None
        assumed = "no GPU here: an H100 is assumed"
        return [PlannedGpu(number, H100, budget.of(0), assumed) for number in numbers or (0,)]
    named = numbers or tuple(range(here))
    gpus = {number: Gpu(number) for number in named}
    budgets = {number: shared_budget(budget_of(gpu, budget), named.count(number)) for number, gpu in gpus.items()}
    return [PlannedGpu(number, gpus[number], budgets[number], gpus[number].name) for number in named]


def described_plan(plan: Plan) -> dict[str, Any]:
    """A Plan as an object."""
    return {
        "budget_bytes": plan.budget,
        "planned_bytes": plan.nbytes,
        "parts": plan.parts,
        "resident_layers": list(plan.resident),
        "streamed_layers": list(plan.streamed),
        "streamed_bytes": plan.streamed_bytes,
    }


def print_pipeline(
    model: str,
    family: Family,
    gpus: list[PlannedGpu],
    kernels: str,
    tokens: int,
    precision: Precision,
    as_json: bool,
) -> None:
    """Say which layers each of several GPUs would run, and how prompts of so many tokens and batches to score would
    flow through them."""
    from ..backends.cuda.bounds import Speed
    from ..backends.cuda.kernel_set import kernel_set_of
    from ..backends.cuda.pipeline.split import Device, Flow, chunk_tokens, split
    from ..backends.cuda.rehearsal import plan_model
    from ..core import BATCH_TOKENS

    kernel_sets = [kernel_set_of(gpu.facts.capability, kernels) for gpu in gpus]
    speeds = [Speed(family, gpu.facts, kernel_set, precision) for gpu, kernel_set in zip(gpus, kernel_sets)]
    devices = [Device(speed, gpu.budget) for speed, gpu in zip(speeds, gpus)]
    chunk = min(tokens, chunk_tokens(tokens, len(gpus)))

    def planned(at_once: int, longest: int, ranks: bool) -> list[Plan]:
        shares = split(devices, longest, at_once, ranks)
        return [
            plan_model(
                family, gpu.facts, kernel_set, gpu.budget, at_once, ranks=ranks, share=share, precision=precision
            )
            for gpu, kernel_set, share in zip(gpus, kernel_sets, shares)
        ]

    plans, batches = planned(chunk, tokens, False), planned(BATCH_TOKENS, BATCH_TOKENS, True)
    pieces = math.ceil(tokens / chunk)
    whole = [speed.seconds(plan, tokens).all for speed, plan in zip(speeds, plans)]
    prompt = Flow(pieces, tokens / pieces, tuple(seconds / pieces for seconds in whole))
    scoring = Flow(
        1000, BATCH_TOKENS, tuple(s.seconds(p, BATCH_TOKENS, ranks=True).all for s, p in zip(speeds, batches))
    )
    crossing = 4 * math.prod(family.residual_shape(tokens))
    if as_json:
        described: dict[str, Any] = {
            "model": model,
            "precision": precision,
            "prompt_tokens": tokens,
            "devices": [
                {
                    "number": gpu.number,
                    "device": gpu.name,
                    "layers": [plan.share.layers.start, plan.share.layers.stop - 1],
                    "score_layers": [own.share.layers.start, own.share.layers.stop - 1],
                    **described_plan(plan),
                    "seconds": seconds,
                }
                for gpu, plan, own, seconds in zip(gpus, plans, batches, whole)
            ],
            "chunk_tokens": chunk,
            "crossing_bytes": crossing,
            "bubble": prompt.bubble,
            "prompt_tokens_per_second": prompt.rate,
            "score_tokens_per_second": scoring.rate,
        }
        print_object(described)
        return
    print_text(wrapped(f"{model}, {precision}, prompts of {tokens} tokens, over {len(gpus)} devices"))
    for gpu, plan, seconds in zip(gpus, plans, whole):
        print_text(wrapped(f"device {gpu.number}, {plan.share} ({gpu.name}): {seconds:.3f} s of a prompt"))
        for line in plan_lines(plan, family):
            click.echo(f"  {line}")
    for line in _flow_lines(prompt, scoring, crossing, len(gpus)):
        click.echo(wrapped(line))


def _flow_lines(prompt: Flow, scoring: Flow, crossing: int, count: int) -> Iterator[str]:
    """How one prompt, and batches to score, go through so many devices, for people."""
    yield (
        f"one prompt, in {prompt.pieces} chunks of {prompt.tokens:.0f} tokens: {prompt.all_seconds:.3f} s, about "
        f"{prompt.rate:.0f} tokens/s; devices wait for one another {prompt.bubble:.0%} of the time"
    )
    yield f"from device to device go {size(crossing)} a prompt, {count - 1} times"
    yield f"score, one batch after another: about {scoring.rate:.0f} tokens/s"
