"""kqprefill kld: how far a model's distributions are from another's, comparable with llama-perplexity's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.core import ParameterSource

from ..backends import device_room
from ..backends.budget import Budget
from ..terminal import json_value
from .common import (
    batch_option,
    how_it_ran,
    open_file,
    print_object,
    say,
    say_loaded,
    special_option,
)
from .interrupts import Interrupted
from .outputs import Outputs, force_option
from .plot import check_plot, draw_divergence
from .progress import Watch, progress_bars
from .run_options import RunOptions, run_options
from .sources import from_home, model_path
from .texts import LongText, bos_of, text_options

if TYPE_CHECKING:
    from ..engine.divergence import Divergence, Estimate
    from ..engine.model import Model
    from ..gguf import ModelFile


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.option(
    "--base",
    metavar="FILE",
    help="What the other model says: a file of `perplexity --save-logits` or llama-perplexity --kl-divergence-base, "
    "which has the text too.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="The other model, which runs beside this one over --file or --tokens; --vram is for both together.",
)
@text_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--plot", "picture", metavar="FILE.png", help="Also draw how divergences are spread.")
@force_option
@special_option
@batch_option
@run_options
def kld(
    name: str,
    base: str | None,
    against: str | None,
    text: str | None,
    tokens: str | None,
    context: int,
    chunks: int | None,
    as_json: bool,
    picture: str | None,
    force: bool,
    no_special: bool,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Compare MODEL's distributions with another's.

    How far they are from another model's, over a text: the figures of llama-perplexity --kl-divergence, of the second
    half of each window. They are the Kullback-Leibler divergence from the other model, the base, in nats; the change of
    the probability of the tokens that came; how often both have the same likeliest token. A file leaves out what is 16
    nats below the likeliest token; --against leaves nothing out. With --precision int8 and neither of the two, MODEL
    at int8 is compared with itself exact; --precision is MODEL's alone.

    \b
    kqprefill kld examples/tiny-qwen3.gguf --precision int8 -f README.md -c 256
    kqprefill kld examples/tiny-qwen3.gguf --against examples/tiny-qwen3.gguf -f README.md -c 256
    """
    if (base is not None and against is not None) or (base is against is None and on.precision == "exact"):
        raise click.UsageError(
            "give what to compare with either as --base FILE or as --against MODEL, or compare MODEL at --precision "
            "int8 with itself"
        )
    if base is None and against is None:
        against = name
    outputs = Outputs(force)
    given = None
    if base is not None:
        _refuse_text_options()
        base = from_home(base)
        outputs.reads(base, "the file of --base")
    else:
        given = LongText(text, tokens, no_special, outputs)
    kind = ""
    if picture is not None:
        kind = check_plot(picture)
        for path in filter(None, (name, against)):
            outputs.reads(model_path(path), "the model")
        outputs.writes_stdout()
        outputs.claim(picture, "--plot")
    on.wake()
    from ..engine.divergence import check_vocabularies, divergence
    from ..engine.logits_file import LogitsFile
    from ..engine.windows import Windows

    opened: AbstractContextManager[BinaryIO | None] = outputs.open(picture, "--plot") if picture else nullcontext()
    watch = None
    try:
        with opened as picture_file, ExitStack() as stack:
            bars = stack.enter_context(progress_bars(not on.quiet))
            watch = Watch(bars, "windows")
            file = open_file(name)
            stack.enter_context(file)

            def open_model(file: ModelFile, on: RunOptions) -> Model:
                return stack.enter_context(on.open(file, bars, batch_tokens, ranks=True))

            if base is not None:
                saved = LogitsFile(base)
                ids, bos, context = saved.tokens.reshape(-1).tolist(), bos_of(file.metadata, name), saved.context
                models = [open_model(file, on)]
                other: Model | LogitsFile = saved
            else:
                assert given is not None and against is not None, "what is compared, and over what text"
                ids, bos = given.ids(file.metadata, name)
                other_file = open_file(against)
                stack.enter_context(other_file)
                room = device_room(on.backend, on.device, None if on.vram is None else Budget.parse(on.vram))
                models = _open_both(file, other_file, on, room, open_model)
                other = models[1]
                if not on.quiet:
                    _say_other_words(models)
            check_vocabularies(models[0], other)  # before its ids are held against the smaller one's
            windows = Windows.of(ids, context, chunks, bos, models)
            watch.begin(windows.tokens.size)
            found = divergence(models[0], other, windows, batch_tokens, watch)
            if on.verbose:
                for model in models:
                    say_loaded(model)
            if picture_file is not None:
                draw_divergence(found, f"{name} ({on.precision}) against {base or against}", picture_file, kind)
    except Interrupted:
        if watch is not None and watch.done:
            on.say(f"interrupted: {watch.done:.0%} of the text was run; the figures need all of it (--chunks N: less)")
        raise
    ran, base_precision = models[0], models[1].precision if against else None
    on.say_summary(f"{found.n_tokens} tokens of {found.windows} windows of {context}, {how_it_ran(ran)}")
    if as_json:
        about = {"context": context, "model": name, "base": base or against, "backend": ran.backend.name}
        about |= {"precision": ran.precision, "base_precision": base_precision}
        print_object(json_value({**_described(found), **about}))
    else:
        click.echo("\n".join(_lines(found)))


def _refuse_text_options() -> None:
    """The text's options, where --base has the text. Raises click's UsageError."""
    context = click.get_current_context()
    names = {"text": "--file", "tokens": "--tokens", "context": "--context", "no_special": "--no-special"}
    sources = (ParameterSource.COMMANDLINE,)  # a variable of the environment may be there for other commands
    wrong = [option for name, option in names.items() if context.get_parameter_source(name) in sources]
    if wrong:
        raise click.UsageError(f"{' and '.join(wrong)}: the file of --base has its text with it")


def _open_both(
    file: ModelFile,
    other: ModelFile,
    on: RunOptions,
    room: int | None,
    open_model: Callable[[ModelFile, RunOptions], Model],
) -> list[Model]:
    """Both files' Models, the other one exact.

    room: bytes of device memory, which are shared out by the size of their weights: the larger model is opened first,
    with its share, and the other one has all that is left. None on the CPU.
    """
    sizes = [sum(tensor.nbytes for tensor in each.tensors.values()) for each in (file, other)]
    swapped = sizes[1] > sizes[0]
    exact = replace(on, precision="exact")
    (larger, on), (smaller, then) = ((other, exact), (file, on)) if swapped else ((file, on), (other, exact))
    first = open_model(larger, on if room is None else replace(on, vram=str(room * max(sizes) // sum(sizes))))
    then = replace(then, backend=first.backend.name, quiet=True)  # what there is to say has been said
    first.backend.take_least()
    if room is not None and first.backend.plans:
        then = replace(then, vram=str(room - max(plan.nbytes for plan in first.backend.plans)))
    second = open_model(smaller, then)
    return [second, first] if swapped else [first, second]


def _say_other_words(models: list[Model]) -> None:
    """Say where the ids of both models do not mean the same."""
    words, others = (model.file.metadata.get("tokenizer.ggml.tokens") or [] for model in models)
    different = sum(a != b for a, b in zip(words, others))
    if different:
        say(f"the vocabularies of both models differ in {different} tokens; ids are those of {models[0].file.path}")


# The rows of llama-perplexity's tables: its name of each share.
_SHARES = {1.0: "Maximum", 0.5: "Median ", 0.0: "Minimum"}


def _lines(found: Divergence) -> Iterator[str]:
    """The tables that llama-perplexity prints, with its digits (llama.cpp, tools/perplexity: `kl_divergence`)."""

    def estimate(of: Estimate) -> str:
        return f"{of.value:10.6f} ± {of.error:10.6f}"

    def percent(of: Estimate) -> str:
        return f"{100 * of.value:6.3f} ± {100 * of.error:5.3f} %"

    yield "====== Perplexity statistics ======"
    yield f"Mean PPL(Q)                   : {estimate(found.perplexity)}"
    yield f"Mean PPL(base)                : {estimate(found.base_perplexity)}"
    yield f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * found.correlation:6.2f}%"
    yield f"Mean ln(PPL(Q)/PPL(base))     : {estimate(found.log_ratio)}"
    yield f"Mean PPL(Q)/PPL(base)         : {estimate(found.ratio)}"
    yield f"Mean PPL(Q)-PPL(base)         : {estimate(found.difference)}"
    yield ""
    yield "====== KL divergence statistics ======"
    yield f"Mean    KLD: {estimate(found.kld)}"
    for share, value in found.kld_at.items():
        yield f"{_SHARES.get(share, f'{100 * share:4.1f}%  ')} KLD: {value:10.6f}"
    yield ""
    yield "====== Token probability statistics ======"
    yield f"Mean    Δp: {percent(found.change)}"
    for share, value in found.change_at.items():
        yield f"{_SHARES.get(share, f'{100 * share:4.1f}%  ')} Δp: {100 * value:6.3f}%"
    yield f"RMS Δp    : {percent(found.change_rms)}"
    yield f"Same top p: {percent(found.same_top)}"


def _described(found: Divergence) -> dict[str, Any]:
    """As docs/json.md says it."""
    estimates = {
        "perplexity": found.perplexity,
        "base_perplexity": found.base_perplexity,
        "log_ratio": found.log_ratio,
        "ratio": found.ratio,
        "difference": found.difference,
        "kld": found.kld,
        "change": found.change,
        "change_rms": found.change_rms,
        "same_top": found.same_top,
    }
    described: dict[str, Any] = {}
    for key, of in estimates.items():
        described |= {key: of.value, f"{key}_stderr": of.error}
    described["correlation"] = found.correlation
    for key, at in (("kld_quantiles", found.kld_at), ("change_quantiles", found.change_at)):
        described[key] = {f"{share:g}": value for share, value in at.items()}
    return {**described, "n_tokens": found.n_tokens, "windows": found.windows}
