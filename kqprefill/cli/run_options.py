"""How a command runs a model: the options that say where and how loudly, and the Model opened as they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
import sys
from typing import TYPE_CHECKING, Any

import click

from ..backends import KERNELS, NAMES, PRECISIONS
from ..backends.devices import device_numbers
from ..backends.wake import wake_gpu
from ..errors import InputError
from .common import Command, say, say_plain

if TYPE_CHECKING:
    from ..core import Progress
    from ..engine.model import Model
    from ..gguf import ModelFile


@dataclass(frozen=True)
class RunOptions:
    """What was given for the options of `run_options`."""

    backend: str
    device: str
    kernels: str
    vram: str | None
    precision: str
    quiet: bool
    verbose: bool

    def wake(self) -> None:
        """Have the driver start beside what Python does next (`wake_gpu`)."""
        wake_gpu(self.backend, device_numbers(self.device) or (0,))

    def open(self, file: ModelFile, progress: Progress | None, max_tokens: int | None, ranks: bool = False) -> Model:
        """A Model of an open file; closes the file on failure.

        max_tokens, ranks: as for kqprefill.engine.model.open_model.
        On the CPU options that mean nothing there are said to be ignored.
        """
        from ..engine.model import open_model

        on = self.backend, self.device, self.kernels
        model = open_model(file, *on, progress, self.say, self.vram, max_tokens, ranks, self.precision)
        if model.backend.name == "cpu" and not self.quiet:
            say_ignored()
        return model

    def say(self, line: str) -> None:
        """A line on stderr that people may do without."""
        if not self.quiet:
            say(line)

    def say_summary(self, line: str) -> None:
        """What was done, on stderr: for a person who looks on, or where it is asked for."""
        if self.verbose or (sys.stderr.isatty() and not self.quiet):
            say_plain(line)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--backend, --device, --kernels, --vram, --precision, --quiet, --verbose; the command gets them as `on`.

    It stands below the command's other options, nearest to the function.
    """

    @wraps(command)
    def run(
        *args: Any,
        backend: str,
        device: str,
        kernels: str,
        vram: str | None,
        precision: str,
        quiet: bool,
        verbose: bool,
        **more: Any,
    ) -> Any:
        return command(*args, on=RunOptions(backend, device, kernels, vram, precision, quiet, verbose), **more)

    return device_options(memory_option(precision_option(_volume_options(run))))


def device_options(command: Command) -> Command:
    """--backend, --device, --kernels."""
    command = click.option(
        "--kernels",
        type=click.Choice(KERNELS),
        default="auto",
        show_default=True,
        envvar="KQPREFILL_KERNELS",
        show_envvar=True,
        help="portable: those of every GPU, where this one has its own.",
    )(command)
    command = click.option(
        "--device",
        default="0",
        show_default=True,
        metavar="N[,N…]|all",
        envvar="KQPREFILL_DEVICE",
        show_envvar=True,
        callback=_checked_devices,
        help="CUDA device number; or several, over which the layers are split.",
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


def _checked_devices(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        device_numbers(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from None
    return value


def memory_option(command: Command) -> Command:
    """--vram."""
    return click.option(
        "--vram",
        metavar="SIZE",
        envvar="KQPREFILL_VRAM",
        show_envvar=True,
        help="GPU memory to take at most, of each device, such as 8G or 75%; layers beyond it are streamed.  "
        "[default: all that is free]",
    )(command)


def precision_option(command: Command) -> Command:
    """--precision."""
    return click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="exact",
        show_default=True,
        envvar="KQPREFILL_PRECISION",
        show_envvar=True,
        help="int8: layers' large quantised matrices, and what they are multiplied by, are rounded to 8 bits; "
        "`kqprefill kld` says what that changes.",
    )(command)


def _volume_options(command: Command) -> Command:
    """--quiet, --verbose."""
    command = click.option("-v", "--verbose", is_flag=True, help="Say what is done, and show tracebacks.")(command)
    return click.option(
        "-q", "--quiet", is_flag=True, envvar="KQPREFILL_QUIET", show_envvar=True, help="Nothing on stderr but errors."
    )(command)


def say_ignored() -> None:
    """Which of the options that were given mean nothing on the CPU."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    names = ("device", "kernels", "vram")
    given = [f"--{n}" for n in names if n in context.params and context.get_parameter_source(n) is not default]
    if given:
        say(f"{' and '.join(given)}: ignored on the CPU")
