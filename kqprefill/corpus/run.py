"""A run that fills a folder of results: a file for each block, and beside them what they were made of and with.

    00000-texts-000003-1a2b3c4d.jsonl   the results of block 3 of input 0, texts.jsonl, whose checksum is 1a2b3c4d
    _kqprefill/manifest.json            the model, its precision, the options, the inputs, and counts
    _kqprefill/blocks.jsonl             a line for each block that is done: where it lies, its file's size, and counts

A block's file is written under another name and renamed once it is whole: that it is there is the record that the block
is done. `blocks.jsonl` only spares later runs from reading it, and the input that it was cut from where that was
not written since; what is not in it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
import fcntl
import json
import os
from pathlib import Path
import re
from typing import Any

from .. import __version__
from ..errors import InputError, KqprefillError
from .folder import OWN, Folder
from .inputs import Block, blocks_of, open_table
from .results import n_tokens_of
from .scorer import Done, Settings

_BLOCK = re.compile(r"(\d{5,}-.*-\d{6,})-([0-9a-f]{8})\.(jsonl|parquet)", re.DOTALL)
BLOCK_BYTES = 4 << 20  # of a block of input: about a million tokens, half a minute of an H100 with an 8B model
_VERSION = 1  # of the manifest: raised where a key comes to mean something else


@dataclass
class Counts:
    """Of blocks: how many, their records (bad ones among them) and the tokens that were scored."""

    blocks: int = 0
    records: int = 0
    bad: int = 0
    n_tokens: int = 0

    def add(self, done: Done) -> None:
        """Count a block."""
        self.blocks += 1
        self.records += done.records
        self.bad += done.bad
        self.n_tokens += done.n_tokens


@dataclass
class Run:
    """A folder that this process alone writes to, with its workers; a context manager.

    resume: whether it may go on with what is there. made_of: "inputs" and "options", which stay what they are for as
    long as the folder is added to; "block_bytes" among the options may be None: what the folder has,
    or BLOCK_BYTES. counts: of the blocks that are done. Raises InputError for a folder that is not to
    be added to: it holds something else, or the results of other inputs or with other options, or another process
    writes it.
    """

    folder: Folder
    made_of: dict[str, Any]
    resume: bool = False
    counts: Counts = field(default_factory=Counts)
    manifest: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0  # of the blocks that have been cut so far
    nbytes_there: int = 0  # of those, of the blocks whose results were there

    def __enter__(self) -> Run:
        path, own = self.folder.path, self.folder.own
        try:
            self._is_new = not os.path.lexists(path)
            self._refuse_others()
            own.mkdir(parents=True, exist_ok=True)
            self._lock = open(own / "lock", "wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it") from None
        except OSError as error:
            raise KqprefillError(f"-o {path} cannot be written: {error.strerror}") from None
        try:
            self._begin()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _refuse_others(self) -> None:
        path = self.folder.path
        there = set(os.listdir(path)) if os.path.isdir(path) else set()
        if there and OWN not in there:
            raise InputError(f"-o {path}: this folder holds something else; name a new one, or an empty one")
        if (self.folder.own / "manifest.json").exists() and not self.resume:
            raise InputError(
                f"-o {path}: it holds results already: --resume goes on with them; else remove it, or name another"
            )

    def _begin(self) -> None:
        self._sweep()
        manifest = self.folder.own / "manifest.json"
        if manifest.exists():
            self.manifest = self._read(manifest)
            options = self.made_of["options"]
            if options["block_bytes"] is None:
                options["block_bytes"] = self.manifest["options"].get("block_bytes")
            self._check("inputs")
            self._check("options")
        elif self.made_of["options"]["block_bytes"] is None:
            self.made_of["options"]["block_bytes"] = BLOCK_BYTES
        self._names, self._counted = self._block_names(), set[str]()
        self._input_written: dict[str, int] = {}
        self._known = self._read_journal()
        self._journal = open(self.folder.own / "blocks.jsonl", "ab")  # noqa: SIM115
        if self._cut is not None:
            self._journal.truncate(self._cut)

    def _sweep(self) -> None:
        """Remove what workers that have gone had not written whole."""
        for left in self.folder.own.glob("*.tmp"):
            with suppress(OSError):
                left.unlink()

    def end(self) -> None:
        """Say that all blocks are done."""
        self.write_manifest(done=True)
        self._sweep()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            manifest = json.loads(path.read_bytes())
            if manifest["version"] == _VERSION and {"model", "inputs", "options"} <= manifest.keys():
                return dict(manifest)
        except OSError as error:
            raise KqprefillError(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise InputError(f"{path}: no manifest of a folder of results that can be gone on with; name another folder")

    def _check(self, key: str) -> None:
        """Raise InputError where what is being done is not what the folder was made with."""
        difference = _difference(self.manifest.get(key), self.made_of[key])
        if difference:
            raise InputError(f"{self.folder.path} was made with other {key} ({difference}); name another folder")

    def check_model(self, model: dict[str, Any]) -> None:
        """Raise InputError where the folder's results were made with another model than this (`identity.model_of`)."""
        known = self.manifest.get("model", model)
        if known.get("digest") != model["digest"]:
            raise InputError(
                f"{self.folder.path} was made with another model, {known.get('path')}, than {model['path']}; "
                "name another folder"
            )

    def made_with(self, model: dict[str, Any], precision: dict[str, Any]) -> None:
        """Say which model scores, and how precisely. Raises InputError where other results of the folder were made with
        another, or differently."""
        self.made_of |= {"model": model, "precision": precision}
        if self.manifest:
            self.check_model(model)
            self._check("precision")
        self.write_manifest(done=False)

    def write_manifest(self, done: bool) -> None:
        """Write down what the results are made of, and how many there are."""
        begun = {"version": _VERSION, "kqprefill": self.manifest.get("kqprefill", __version__)}
        content = begun | self.manifest | self.made_of | {"done": done} | asdict(self.counts)
        with Folder(str(self.folder.path)).open(f"{OWN}/manifest.json") as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        self.manifest = content

    def to_do(self, settings: Settings) -> Iterator[Block]:
        """The blocks whose results are not there, each cut from its file when it is asked for; those that are there are
        counted. Raises InputError where there are results of what a file was before."""
        for number, entry in enumerate(self.made_of["inputs"]):
            known = self._cut_before(entry["path"])  # before it is read: what is written meanwhile is newer
            for block in blocks_of(entry["path"], number, self.made_of["options"]["block_bytes"], known):
                self.nbytes += block.nbytes
                if self._has(block, block.name(f".{settings.form_of(block)}")):
                    self.nbytes_there += block.nbytes
                else:
                    yield block

    def _cut_before(self, path: str) -> dict[int, Block]:
        """The blocks of a file that earlier runs have done, by their numbers, where it was not written since."""
        cut, when = self._blocks.get(path, {}), _written(path)
        self._input_written[path] = when
        return {number: block for number, (block, then) in cut.items() if then == when}

    def _has(self, block: Block, name: str) -> bool:
        names = self._names.get(block.place, [])
        if any(other != name for other in names):
            raise InputError(
                f"{block.where} have changed since {self.folder.path} was made; name another folder, or remove "
                f"{next(other for other in names if other != name)}"
            )
        if not names:
            return False
        done = self._held(name)
        if done is None:
            return False
        if name not in self._known:
            self._write_down(block, done)
        self._count(done)
        return True

    def _held(self, name: str) -> Done | None:
        """What a block's file that is there holds, as it was noted, or read; None where it is not whole."""
        done = self._known.get(name) or self._read_results(name)
        whole = done is not None and os.path.getsize(os.path.join(self.folder.path, name)) == done.size
        return done if whole else None  # a file system that was cut off may leave less than was written

    def add(self, block: Block, done: Done) -> None:
        """Note what this run has made of a block."""
        if not os.path.exists(os.path.join(self.folder.path, done.name)):
            raise KqprefillError(
                f"{self.folder.path}: {done.name} was written by a worker and is not seen here; all machines must "
                "share the folder"
            )
        self._count(done)
        self._write_down(block, done)

    def _count(self, done: Done) -> None:
        self.counts.add(done)
        self._counted.add(done.name)

    def records_there(self) -> int:
        """The records of all results that are there: after an interrupt, also of a block whose file came just before it
        and was not added, and of those that were not looked for yet."""
        there = self._block_names() if self.manifest else {}  # else nothing has begun
        others = (name for names in there.values() for name in names if name not in self._counted)
        held = map(self._held, others)
        return self.counts.records + sum(done.records for done in held if done is not None)

    def _write_down(self, block: Block, done: Done) -> None:
        line = asdict(done) | {"block": asdict(block), "input_written": self._input_written[block.path]}
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def _block_names(self) -> dict[str, list[str]]:
        """The names of the results that are there, by `Block.place`."""
        found: dict[str, list[str]] = {}
        for name in os.listdir(self.folder.path):
            if match := _BLOCK.fullmatch(name):
                found.setdefault(match[1], []).append(name)
        return found

    def _read_journal(self) -> dict[str, Done]:
        known: dict[str, Done] = {}
        self._blocks: dict[str, dict[int, tuple[Block, int]]] = {}
        self._cut: int | None = None
        end = 0
        with suppress(FileNotFoundError), open(self.folder.own / "blocks.jsonl", "rb") as file:
            for line in file:
                try:
                    told = json.loads(line)
                    block, when = Block(**told.pop("block")), told.pop("input_written")
                    done = Done(**told)
                except (ValueError, TypeError, KeyError, AttributeError):
                    self._cut = end  # what a run that was killed has not written whole
                    break
                known[done.name], end = done, end + len(line)
                self._blocks.setdefault(block.path, {})[block.number] = block, when
        return known

    def _read_results(self, name: str) -> Done | None:
        """What a block's file holds; None where it is not whole."""
        path = os.path.join(self.folder.path, name)
        try:
            if name.endswith(".parquet"):
                table = open_table(path).read(["error", "n_tokens", "choices"])
                lines = table.to_pylist()
            else:
                lines = [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
            bad = sum(line.get("error") is not None for line in lines)
            n_tokens = sum(n_tokens_of(line) for line in lines)
        except (KqprefillError, ValueError, TypeError, OSError, KeyError):
            return None
        return Done(name, os.path.getsize(path), len(lines), bad, n_tokens)

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._journal.close()
        if not self.manifest:  # nothing has begun
            for name in ("blocks.jsonl", "lock"):
                (self.folder.own / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.own.rmdir()
                if self._is_new:
                    os.rmdir(self.folder.path)
        self._lock.close()


def _written(path: str) -> int:
    """When a file was last written, in nanoseconds; -1 where it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _difference(before: Any, now: Any) -> str:
    """What is not the same, in a few words; empty where all is."""
    if isinstance(before, list) and isinstance(now, list):
        known, given = ({str(entry.get("path")): entry for entry in entries} for entries in (before, now))
        for path in [*given, *known]:
            if path not in known or path not in given:
                return f"{path} is {'new' if path in given else 'missing now'}"
            if known[path] != given[path]:
                return f"{path} has {given[path].get('bytes')} bytes, not {known[path].get('bytes')}"
        return "" if before == now else "their order"
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key}: {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}"
        return ""
    return "" if before == now else "they cannot be read"
