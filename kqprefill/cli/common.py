"""What the commands share: options, token lists, progress on a terminal, files written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ..backends import KERNELS, NAMES
from ..errors import InputError, KqprefillError

if TYPE_CHECKING:
    from ..backends.cuda.weights.plan import Plan
    from ..core import Progress
    from ..engine.model import Model
    from ..gguf import GGUFFile
    from ..models.family import Family
    from ..synthetic import SyntheticFile

STDIO = "-"

# A command's function, which an option is added to.
Command = TypeVar("Command", bound=Callable[..., Any])


def kernels_option(command: Command) -> Command:
    """--kernels."""
    return click.option(
        "--kernels",
        type=click.Choice(KERNELS),
        default="auto",
        show_default=True,
        envvar="KQPREFILL_KERNELS",
        show_envvar=True,
        help="portable: those of every GPU, where this one has its own.",
    )(command)


def device_options(command: Command) -> Command:
    """--backend, --device, --kernels."""
    command = kernels_option(command)
    command = click.option(
        "--device", default=0, metavar="N", envvar="KQPREFILL_DEVICE", show_envvar=True, help="CUDA device number."
    )(command)
    return click.option(
        "--backend",
        type=click.Choice(NAMES),
        default="auto",
        show_default=True,
        envvar="KQPREFILL_BACKEND",
        show_envvar=True,
        help="auto takes the GPU where it can be used.",
    )(command)


def memory_option(command: Command) -> Command:
    """--vram."""
    return click.option(
        "--vram",
        metavar="SIZE",
        envvar="KQPREFILL_VRAM",
        show_envvar=True,
        help="GPU memory to take at most, such as 8G or 75%; layers beyond it are streamed.  "
        "[default: all that is free]",
    )(command)


def batch_option(command: Command) -> Command:
    """--batch-tokens."""
    return click.option(
        "--batch-tokens",
        default=8192,
        show_default=True,
        metavar="T",
        type=click.IntRange(1),
        envvar="KQPREFILL_BATCH_TOKENS",
        show_envvar=True,
        help="Tokens that are packed into one batch, at most.",
    )(command)


def volume_options(command: Command) -> Command:
    """--quiet, --verbose."""
    command = click.option("-v", "--verbose", is_flag=True, help="Say what is done, and show tracebacks.")(command)
    return click.option(
        "-q", "--quiet", is_flag=True, envvar="KQPREFILL_QUIET", show_envvar=True, help="Nothing on stderr but errors."
    )(command)


def open_file(name: str) -> GGUFFile | SyntheticFile:
    """A GGUFFile, or the SyntheticFile of a SHAPE:RECIPE. Raises GGUFError, InputError."""
    from ..gguf import GGUFFile
    from ..synthetic import SyntheticFile

    is_file = os.path.exists(name) or name.endswith(".gguf") or os.sep in name
    return GGUFFile(name) if is_file else SyntheticFile.named(name)


def plan_lines(plan: Plan, family: Family) -> Iterator[str]:
    """A residency Plan for people."""
    yield f"GPU memory: {size(plan.nbytes)} of {size(plan.budget)} that may be taken"
    width = max(map(len, plan.parts))
    for name, nbytes in plan.parts.items():
        yield f"  {name:{width}}  {size(nbytes):>10}"
    yield f"layers: {len(plan.resident)} of {len(family.blocks)} stay, {len(plan.streamed)} are streamed" + (
        ", and the embedding's rows" if plan.streamed and family.output is not family.token_embd else ""
    )


def say_loaded(model: Model) -> None:
    """What an open Model's backend has loaded, and where, on stderr."""
    loaded = model.backend.loaded
    if model.backend.plan is None or loaded is None:
        return
    rate = loaded.nbytes / loaded.seconds / 1e9
    click.echo(f"weights that stay: {size(loaded.nbytes)} in {loaded.seconds:.3f} s, {rate:.1f} GB/s", err=True)
    for line in plan_lines(model.backend.plan, model.family):
        click.echo(line, err=True)


def say_summary(line: str, quiet: bool, verbose: bool) -> None:
    """What was done, on stderr: for a person who looks on, or where it is asked for."""
    if verbose or (sys.stderr.isatty() and not quiet):
        click.echo(line, err=True)


def read_text(text: str, option: str) -> str:
    """A prompt as it is, from stdin (`-`) or from a file (`@FILE`). Raises InputError."""
    try:
        if text == STDIO:
            return sys.stdin.buffer.read().decode("utf-8")
        if text.startswith("@"):
            with open(text[1:], "rb") as file:
                return file.read().decode("utf-8")
    except OSError as error:
        raise InputError(f"{option} {text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {text}: not a text file (byte {error.start} is no UTF-8)") from None
    return text


def read_tokens(text: str) -> list[int]:
    """IDs from `1,2,3` or `1 2 3`, from stdin (`-`) or from a file (`@FILE`). Raises InputError."""
    where = "stdin" if text == STDIO else text[1:] if text.startswith("@") else "--tokens"
    ids = []
    for word in read_text(text, "--tokens").replace(",", " ").split():
        try:
            ids.append(int(word))
        except ValueError:
            raise InputError(
                f"{where}: {word[:40]!r} is not a token id; give integers, separated by commas or spaces"
            ) from None
    if not ids:
        raise InputError(f"{where}: the prompt is empty; give at least one token id")
    return ids


@contextmanager
def output_file(path: str) -> Iterator[BinaryIO]:
    """A binary file to write `path` through: renamed into place at the end, or removed if the work fails.

    A pipe or a device is written as it is, and a symbolic link leads to the file that is replaced.
    """
    if path == STDIO:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:  # a folder says so itself
                yield file
            return
        target = os.path.realpath(path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".kqprefill-", suffix=".tmp")
        os.close(handle)
        try:
            with open(temporary, "wb") as file:  # by name, which whoever writes may need
                yield file
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise KqprefillError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def progress_bars(enabled: bool) -> Iterator[Progress | None]:
    """A progress(stage, done, total) callback: bars on stderr where it is a terminal and `enabled`, else None."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def warner(quiet: bool) -> Callable[[str], None]:
    """warn(line) to stderr, or to nowhere."""
    return (lambda line: None) if quiet else (lambda line: click.echo(f"kqprefill: {line}", err=True))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    cells = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells)


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
