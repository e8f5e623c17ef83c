"""kqprefill score into a folder: many files in, a file of results for each block of them; here, or over a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
import os
import re
import time
from typing import Any

import click

from ..backends.budget import Budget
from ..corpus.folder import Folder
from ..corpus.inputs import Block, files_of, parquet
from ..corpus.run import Run
from ..corpus.scorer import BlockScorer, Done, Settings
from ..errors import InputError, KqprefillError
from .common import Command, open_file, say_batches, say_loaded, say_plain
from .interrupts import Interrupted
from .outputs import STDIO
from .progress import Bars, progress_bars
from .run_options import RunOptions
from .sources import from_home, model_path

_SOME_BAD = 3  # the exit status where some records could not be scored
_LARGEST_BLOCK = 1 << 30  # bytes: a worker has it in memory


@dataclass(frozen=True)
class FolderOptions:
    """What was given for the options of `folder_options`. ray: an address, "auto", or None for this process alone."""

    ray: str | None
    replicas: int | None
    block: str | None
    form: str | None

    @staticmethod
    def given(context: click.Context) -> str:
        """One of them that is given on the command line (the environment is for other runs, too), as it is called;
        empty where none is."""
        line = click.core.ParameterSource.COMMANDLINE
        named = {"ray": "--ray", "replicas": "--replicas", "block": "--block", "form": "--format"}
        return next((option for name, option in named.items() if context.get_parameter_source(name) is line), "")

    def check(self) -> None:
        """Raises click's UsageError for what does not go together."""
        if self.replicas is not None and self.ray is None:
            raise click.UsageError("--replicas: of a cluster; give --ray too")
        if self.ray is not None and not (self.ray in ("auto", "local") or _is_address(self.ray)):
            raise click.UsageError(
                f"--ray {self.ray}: a cluster's HOST:PORT, auto or local is wanted; where another word follows, write "
                "--ray=auto"
            )

    def block_bytes(self) -> int | None:
        """The size of blocks, where it is given. Raises InputError."""
        if self.block is None:
            return None
        size = Budget.parse(self.block)
        if size.is_share or not 1 <= size.amount <= _LARGEST_BLOCK:
            raise InputError(f"--block {self.block}: give a size such as 4M, at most {_LARGEST_BLOCK >> 30}G")
        return int(size.amount)


def folder_options(command: Command) -> Command:
    """--ray, --replicas, --block, --format: the command gets them under these names, the last as `form`."""
    command = click.option(
        "--format",
        "form",
        type=click.Choice(["jsonl", "parquet"]),
        help="Of an output folder's files.  [default: each input's]",
    )(command)
    command = click.option(
        "--block",
        metavar="SIZE",
        envvar="KQPREFILL_BLOCK",
        show_envvar=True,
        help="Of an output folder: input for one file of results, which is what a run that ends loses at most of each "
        "replica's work.  [default: 4M]",
    )(command)
    command = click.option(
        "--replicas", metavar="N", type=click.IntRange(1), help="Of the model on a cluster.  [default: one a GPU]"
    )(command)
    return click.option(
        "--ray",
        metavar="[ADDRESS]",
        is_flag=False,
        flag_value="auto",
        envvar="KQPREFILL_RAY",
        show_envvar=True,
        help="Score over a Ray cluster, into an output folder: that of HOST:PORT, the one that this machine is in "
        "(auto), or one of this machine alone (local).",
    )(command)


def _is_address(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", text) is not None


def is_folder(path: str) -> bool:
    """Whether an output is a folder of results: it is there as one, or its name ends in `/`."""
    return path != STDIO and (path.endswith(os.sep) or os.path.isdir(path))


def score_folder(
    name: str,
    files: Sequence[str],
    output: str,
    resume: bool,
    settings: Settings,
    options: FolderOptions,
    on: RunOptions,
) -> int:
    """Score files into a folder. The exit status: 0, or 3 where records were skipped."""
    options.check()
    paths = _inputs_of(files, output)
    if settings.form == "parquet":
        parquet()
    inputs = [{"path": path, "bytes": os.path.getsize(path)} for path in paths]
    made_of: dict[str, Any] = {
        "inputs": inputs,
        "options": settings.described() | {"block_bytes": options.block_bytes()},
    }
    run: Run | None = None
    begin = time.perf_counter()
    tokens = records = 0
    try:
        with ExitStack() as stack:
            run = stack.enter_context(Run(Folder(os.path.abspath(output)), made_of, resume))
            bars = stack.enter_context(progress_bars(not on.quiet))
            work = _Work(run, settings, sum(map(os.path.getsize, paths)), bars)
            scored = _here(name, work, on) if options.ray is None else _over_ray(name, work, options, on, stack)
            for block, done in scored:
                run.add(block, done)
                work.first_error = work.first_error or done.first_error
                tokens, records = tokens + done.tokens, records + done.records
            _check(run, work.first_error, paths)
            run.end()
    except Interrupted:
        if run is not None:
            on.say(f"interrupted: {run.records_there()} records are done in {output}; --resume goes on from there")
        raise
    rate = tokens / (time.perf_counter() - begin)
    ran = f"{records} records, {tokens} tokens, {rate:.0f} tokens/s, {on.precision}"
    on.say_summary(f"{ran}; {run.counts.records} records in {output}")
    return status_of(run.counts.bad, run.counts.records, on)


def status_of(bad: int, records: int, on: RunOptions) -> int:
    """The exit status where so many records could not be scored: 0, or 3 for some, which is said."""
    if bad:
        on.say(f"{bad} of {records} records could not be scored and were skipped; their lines say why")
    return _SOME_BAD if bad else 0


def _inputs_of(files: Sequence[str], output: str) -> list[str]:
    """The files to score, from the root on. Raises as `files_of`; InputError where outputs would be inputs."""
    if STDIO in (files or (STDIO,)):
        raise InputError("stdin cannot be cut into blocks: an output folder wants files, globs or folders")
    target = os.path.realpath(output)
    for path in map(from_home, files):
        if os.path.isdir(path) and (target + os.sep).startswith(os.path.realpath(path) + os.sep):
            raise InputError(f"-o {output}: it lies in {path}, whose files are read; name a folder beside it")
    paths = [os.path.abspath(path) for path in files_of([from_home(path) for path in files])]
    for path in paths:
        if os.path.realpath(path).startswith(target + os.sep):
            raise InputError(f"-o {output}: {path} is in it, which is read; name another folder")
    return paths


def _check(run: Run, first_error: str, paths: Sequence[str]) -> None:
    """Raise KqprefillError where no record was scored."""
    counts = run.counts
    if not counts.records:
        raise KqprefillError(f"{', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}: there are no records")
    if counts.bad == counts.records:
        first = f"; the first: {first_error}" if first_error else ""
        raise KqprefillError(f"none of the {counts.bad} records could be scored{first}")


class _Work:
    """What there is to do, and how far it is on the bar."""

    def __init__(self, run: Run, settings: Settings, nbytes: int, bars: Bars | None) -> None:
        self.run, self.settings, self.nbytes, self.bars = run, settings, nbytes, bars
        self.blocks = run.to_do(settings)
        self.first_error = ""
        self._done, self._tokens, self._begin = 0.0, 0, time.perf_counter()

    def show(self, block: Block, part: float, done: Done | None, note: str = "") -> None:
        """So much of a block is done; done: what came of it, once all is."""
        if done is not None:
            self._done, self._tokens = self._done + block.nbytes, self._tokens + done.tokens
            part = 0.0
        if self.bars:
            rate = self._tokens / (time.perf_counter() - self._begin)
            at = self.run.nbytes_there + self._done + part * block.nbytes
            self.bars("score", at, self.nbytes, note or f"{self.run.counts.records} records, {rate:.0f} tokens/s")


def _here(name: str, work: _Work, on: RunOptions) -> Iterator[tuple[Block, Done]]:
    """Blocks, one after another, through a model of this process."""
    from ..corpus.identity import model_of, precision_of

    first = next(work.blocks, None)
    file = open_file(name)
    try:
        model = model_of(file)
    except BaseException:
        file.close()
        raise
    if first is None:
        work.run.check_model(model)
        file.close()
        return
    on.wake()
    with on.open(file, work.bars, work.settings.batch_tokens, ranks=True) as opened:
        work.run.made_with(model, precision_of(file, opened.backend.name, on.kernels, on.precision))
        scorer = BlockScorer(opened, work.settings)
        block: Block | None = first
        while block is not None:
            done = scorer.write(block, work.run.folder, _heard(work, block))
            yield block, done
            work.show(block, 1.0, done)
            block = next(work.blocks, None)
        if on.verbose:
            say_loaded(opened)
            say_batches(opened, work.settings.batch_tokens, work.settings.wanted.ranks)


def _heard(work: _Work, block: Block) -> Callable[[float], None]:
    return lambda part: work.show(block, part, None)


def _over_ray(
    name: str, work: _Work, options: FolderOptions, on: RunOptions, stack: ExitStack
) -> Iterator[tuple[Block, Done]]:
    """Blocks through the replicas of a cluster. Raises InputError where Ray is not installed."""
    if on.device != "0":
        raise click.UsageError(f"--device {on.device}: Ray gives each replica its GPU; leave it out")
    try:
        pool: Any = import_module("kqprefill.ray.pool")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise InputError("--ray needs Ray: pip install 'kqprefill[ray]'") from None
    first = next(work.blocks, None)
    if first is None:
        return
    path = model_path(name)
    place = os.path.abspath(path) if os.path.exists(path) else path
    model = {"model": place, "backend": on.backend, "device": 0, "kernels": on.kernels, "vram": on.vram}
    model["precision"] = on.precision
    cluster = stack.enter_context(pool.Cluster(options.ray, options.replicas, model, work.settings, on.say, on.verbose))
    for block, done in cluster.scored(chain([first], work.blocks), work.run):
        yield block, done
        work.show(block, 1.0, done, cluster.note())
    if on.verbose:
        for line in cluster.table():
            say_plain(line)
