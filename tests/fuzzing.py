"""Runs commands on files with faults, each in a process of its own, and says what is wrong with how they end.

Wrong are: a traceback, a warning of NumPy's, more than one line on stderr, an exit status that does not fit it, more
than a second of the processor, memory that the file does not explain, NaN in JSON, and, on a terminal, any character
that the terminal would obey.
"""

import json
import os
from pathlib import Path
import pty
from random import Random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import unicodedata

from fuzz_files import EVIL, damaged_files

SECONDS = 1.0  # of the processor
PATIENCE = 20.0  # seconds until a process that does nothing is ended
MEMORY = 64 << 20, 48  # bytes that any file may take, and for each byte of the file

PROMPTS = ["Hello", "he said hello <s> a", "é😀\n\tab</s>", "<|end|> hell"]
RECORDS = [{"prompt": "Hello a"}, {"tokens": [1, 2, 3]}, {"prompt": "ab", "choices": [" a", "b"]}]
RECORDS += [{"tokens": [5, 6], "completion": [7, 8]}]
CPU = ["--backend", "cpu"]
COMMANDS = [
    ["run", "FILE", "--tokens", "1,2,3,250,17", *CPU],
    ["run", "FILE", "--tokens", "1,2,3,250,17", "--json", *CPU],
    ["run", "FILE", "--tokens", "5,6,7,8,9,10,11,12,13,14", "--top", "3", *CPU],
    ["run", "FILE", "--tokens", "1,2,3", "--logits", "/dev/null", "--all-positions", "--json", *CPU],
    ["run", "FILE", "--prompt", "TEXT", "--text", *CPU],
    ["run", "FILE", "--prompt", "TEXT", "--json", *CPU],
    ["score", "FILE", "-", "--per-token", "--top", "2", *CPU],
    ["score", "FILE", "-", "--on-error", "skip", *CPU],
    ["score", "FILE", "-", "--per-token", "--top", "256", "--on-error", "skip", *CPU],
    ["perplexity", "FILE", "--tokens", "1,2,3,4,5,6,7,8,9,10,11,12", "-c", "6", "--json", *CPU],
    ["tokenize", "FILE", "TEXT"],
    ["tokenize", "FILE", "TEXT", "--json"],
    ["inspect", "FILE"],
    ["inspect", "FILE", "--json"],
    ["inspect", "FILE", "--tensors"],
    ["inspect", "FILE", "--metadata"],
    ["inspect", "FILE", "--metadata", "--json"],
]
# Commands that are run on a terminal, too.
ON_TERMINAL = {"inspect", "run", "score", "tokenize", "perplexity"}
# What is wrong with the arguments rather than with the file: exit status 2. (The file decides what fits it.)
USAGE = re.compile(
    "not in the vocabulary|context length|has no token for|prompt is empty|the vocabulary has|adds no token|"
    "a context of|tokens, but one window|tokenizers library"
)


def warm_up():
    """Import what the commands need, so that each process has it from its beginning."""
    import gguf.quants
    import rich.progress
    import tokenizers

    import kqprefill.backends.cpu.backend
    import kqprefill.cli.arrays
    import kqprefill.cli.commands
    import kqprefill.cli.page
    import kqprefill.engine.perplexity

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return gguf, rich, tokenizers, kqprefill


class Outcome:
    """How a process ended: status (negative: the signal), stdout and stderr, seconds of the processor, bytes."""

    def __init__(self, status, stdout, stderr, seconds, nbytes):
        self.status, self.stdout, self.stderr = status, stdout, stderr
        self.seconds, self.nbytes = seconds, nbytes


def run_forked(args, stdin, terminal):
    """The Outcome of `kqprefill ARGS` in a fork of this process; stdout is a pipe or a terminal."""
    own_out, out = pty.openpty() if terminal else os.pipe()
    own_err, err = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.memfd_create("stdin"), 0)
            os.write(0, stdin)
            os.lseek(0, 0, os.SEEK_SET)
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.closerange(3, 64)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["kqprefill", *args]
            from kqprefill.cli import main

            main()
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        os._exit(70)
    os.close(out)
    os.close(err)
    parts, waiting, end = {own_out: [], own_err: []}, {own_out, own_err}, time.monotonic() + PATIENCE
    while waiting and time.monotonic() < end:
        for ready in select.select(list(waiting), [], [], 0.5)[0]:
            try:
                part = os.read(ready, 1 << 16)
            except OSError:  # a terminal that nobody has any more
                part = b""
            parts[ready].append(part)
            if not part:
                waiting.discard(ready)
    if waiting:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    os.close(own_out)
    os.close(own_err)
    stdout, stderr = (b"".join(parts[handle]).decode("utf-8", "surrogateescape") for handle in (own_out, own_err))
    seconds = PATIENCE if waiting else used.ru_utime + used.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, seconds, used.ru_maxrss * 1024)


def obeyed(text):
    """The first character that a terminal would obey, but for line ends and tabs; None where there is none."""
    bad = (
        c for c in text if c not in "\r\n\t\u200c\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn")
    )
    return next(bad, None)


def refuse(constant):
    raise ValueError(constant)


def faults_of(outcome, args, terminal, file_bytes, memory_before):
    """What is wrong with how a command ended."""
    status, stderr = outcome.status, outcome.stderr
    lines = stderr.splitlines()
    if status not in (0, 1, 2, 3):
        yield f"status {status}"
    if any(word in stderr for word in ("Traceback", "Warning", "an error in kqprefill itself")):
        yield "a traceback or a warning"
    if status == 0 and stderr and "--on-error" not in args:
        yield "status 0 beside an error"
    elif status and (len(lines) != 1 or not stderr.startswith("kqprefill: ")):
        yield f"{len(lines)} lines on stderr with status {status}"
    elif status and args[0] != "score" and (status == 2) != bool(USAGE.search(stderr)):
        yield f"status {status} does not fit"
    if (bad := obeyed(stderr)) or (terminal and (bad := obeyed(outcome.stdout))):
        yield f"the character {bad!r} for a terminal"
    if outcome.seconds > SECONDS:
        yield f"{outcome.seconds:.2f} s"
    if outcome.nbytes > memory_before + MEMORY[0] + MEMORY[1] * file_bytes:
        yield f"{(outcome.nbytes - memory_before) >> 20} MiB for a file of {file_bytes} bytes"
    if status in (0, 3) and ("--json" in args or args[0] == "score"):
        try:
            for line in outcome.stdout.splitlines() if args[0] == "score" else [outcome.stdout]:
                json.loads(line, parse_constant=refuse)
        except ValueError as error:
            yield f"no JSON: {error}"


def fuzz(seed, count, folder, report, begin=0):
    """Run a command on each of `count` damaged models; report(line) hears of each fault. Returns how many there were.

    folder: where the files are written; those with a fault stay there.
    """
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = 0
    stdin = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    for index in range(begin, begin + count):
        name = f"{seed}:{index}"
        files, done = damaged_files(name)
        here = Path(folder, str(index))
        here.mkdir()
        for file, raw in files.items():
            (here / file).write_bytes(raw)
        random, size = Random(name), sum(map(len, files.values()))
        words = {"FILE": str(here / next(iter(files))), "TEXT": random.choice(PROMPTS)}
        args = [words.get(word, word) for word in random.choice(COMMANDS)]
        terminal = args[0] in ON_TERMINAL and random.random() < 0.7
        outcome = run_forked(args, stdin, terminal)
        faults = list(faults_of(outcome, args, terminal, size, memory_before))
        for fault in faults:
            report(f"{name} {'+'.join(done)}: {' '.join(args)}: {fault}: {outcome.stderr[-600:]!r}")
        found += bool(faults)
        if not faults:
            shutil.rmtree(here)
    return found


assert obeyed(EVIL)
