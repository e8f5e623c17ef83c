"""CUDA source to machine code through NVRTC, and a disk cache of what came out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
import hashlib
import os
from pathlib import Path
import re
import stat
import tempfile
from typing import TextIO

from ..constants import SHARED_DEFINES, THREADS
from .codebooks import definitions
from .gpu import cuda_errors, import_cuda
from .own_files import home_folder, read_own, why_not_own

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')
_CACHE_VERSION = 4  # part of every key: raise it when the entries' layout, or the options, change
_DIGEST = hashlib.sha256
_MARK = b"kqprefill kernel\n"  # what an entry begins with
_ENTRY, _LEFT_OVER = re.compile(r"[0-9a-f]{64}\.(cubin|ptx)"), re.compile(r"\.kqprefill-\w+\.tmp")


def kernel_folder() -> Path:
    """Where the .cu files are: in the installed package, or at the top of a source tree."""
    package = Path(__file__).resolve().parents[3]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


@dataclass(frozen=True)
class Target:
    """What programs are compiled to: NVRTC's code type ("cubin" or "ptx") and architecture ("sm_90a")."""

    code_type: str
    arch: str


@dataclass(frozen=True)
class Program:
    """A .cu file with the constants that it is compiled with, besides those of every program (SHARED_DEFINES).

    Its kernels are compiled together. threads, shared_bytes: of a block, where the program itself decides them; the
    kernels of the others have their threads from THREADS, and no dynamic shared memory.
    """

    source: str
    constants: tuple[tuple[str, str], ...] = ()
    threads: int | None = None
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.source, self.constants)))  # made once: every launch asks for it

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __str__(self) -> str:
        return self.source + "".join(f" {name}={value}" for name, value in self.constants)

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """All macros that it is compiled with."""
        launched = {} if self.threads is None else {"THREADS": self.threads, "SHARED_BYTES": self.shared_bytes}
        shared = ((name, str(value)) for name, value in {**SHARED_DEFINES, **launched}.items())
        return (*shared, *self.constants)

    def threads_of(self, kernel: str) -> int:
        """Threads of a block of one of its kernels."""
        return THREADS[kernel] if self.threads is None else self.threads


def flatten(path: Path, seen: set[Path] | None = None) -> str:
    """The text of a .cu file with its quoted includes in place, each once: the cache's key can then be made of it."""
    seen = set() if seen is None else seen
    path = path.resolve()
    if path in seen:
        return ""
    seen.add(path)
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if match := _INCLUDE.match(line):
            lines += [flatten(path.parent / match[1], seen), f'#line {number + 1} "{path.name}"']
        elif line.strip() != "#pragma once":
            lines.append(line)
    return f'#line 1 "{path.name}"\n' + "\n".join(lines)


@cache
def text_of(source: str) -> str:
    """The flattened text of a .cu file, read once: many programs differ in their constants alone."""
    return flatten(kernel_folder() / source)


def text_for(program: Program) -> str:
    """What NVRTC compiles: the .cu file's text after the tables of the block formats that it is compiled for."""
    names = [name for key, value in program.constants if key in ("FORMAT", "FORMATS") for name in value.split(",")]
    return definitions(names) + text_of(program.source)


def known_architectures() -> list[int]:
    """The compute capabilities that NVRTC compiles for, as two digits (90), ascending."""
    from cuda.bindings import nvrtc

    return sorted(nvrtc.nvrtcGetSupportedArchs()[1])


def compile_program(program: Program, target: Target, logs: TextIO | None = None) -> bytes:
    """Machine code of a program. logs hears what ptxas says of it. Raises BackendError with NVRTC's first complaint."""
    core, _ = import_cuda()
    options = core.ProgramOptions(
        name=program.source,
        arch=target.arch,
        std="c++17",
        define_macro=list(program.defines),
        # Multiply and add are fused where the source says so. Left to the compiler, it depends on an output's place in
        # a tile.
        fma=False,
        ptxas_options=["-v"] if logs is not None else None,
    )
    with cuda_errors(f"compiling {program} for {target.arch}"):
        code = core.Program(text_for(program), "c++", options)
        return bytes(code.compile(target.code_type, logs=logs).code)


class KernelCache:
    """Compiled programs in the user's cache folder, keyed by source, constants, compiler and architecture.

    An entry is a mark, the SHA-256 of key and code, and the code, written to a temporary file and renamed: a reader
    sees all of it or nothing, two processes may write at once, and an entry that is damaged, or stands under another
    name than its own, is compiled again. So is one that somebody else could have written: `own_files` says what is
    believed. Where the folder cannot be written or is not the user's own, the cache is off and every start compiles.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """folder: instead of $KQPREFILL_CACHE_DIR, or kqprefill in $XDG_CACHE_HOME or in ~/.cache. Neither variable
        counts where it is no absolute path, which would be another folder in each folder that a command runs in."""
        self.folder: Path | None = _cache_folder() if folder is None else Path(folder)

    def get(self, program: Program, target: Target) -> tuple[bytes, bool]:
        """(code, whether it came from the cache)."""
        key = self._key(program, target)
        path = None if self.why_off() else self._path(f"{key}.{target.code_type}")
        code = None if path is None else self._read(path, key)
        if code is not None:
            return code, True
        code = compile_program(program, target)
        if path is not None:
            self._write(path, key, code)
        return code, False

    def held(self) -> tuple[int, int]:
        """(entries, bytes) on disk, of those that can be seen."""
        sizes = []
        for path in self._entries():
            with suppress(OSError):
                sizes.append(path.lstat().st_size)
        return len(sizes), sum(sizes)

    def clear(self) -> tuple[int, int]:
        """Remove all entries; (how many, their bytes). Raises OSError where one cannot be removed."""
        held = self.held()
        for path in list(self._entries()):
            path.unlink(missing_ok=True)
        return held

    def why_off(self) -> str | None:
        """Why nothing is kept, and what to do, in a line; or None."""
        if self.folder is None:
            return "there is no home folder: set KQPREFILL_CACHE_DIR to an absolute path"
        why = why_not_own(self.folder)
        if why is None and self.folder.is_dir() and not os.access(self.folder, os.W_OK | os.X_OK):
            why = f"{self.folder} cannot be written; set KQPREFILL_CACHE_DIR to a folder that can"
        return why

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _entries(self) -> Iterable[Path]:
        """What the cache wrote, of this version or an earlier one, and what a killed process left of one: nothing else
        that may lie there, whatever its name is."""
        try:
            paths = sorted(self.folder.iterdir()) if self.folder is not None else []
        except OSError:
            return
        for path in paths:
            if _LEFT_OVER.fullmatch(path.name) or (_ENTRY.fullmatch(path.name) and _is_entry(path)):
                yield path

    def _key(self, program: Program, target: Target) -> str:
        from cuda.bindings import nvrtc

        compiler = nvrtc.nvrtcVersion()[1:]
        parts = _CACHE_VERSION, text_for(program), program.defines, compiler, target.code_type, target.arch
        return _DIGEST(repr(parts).encode()).hexdigest()

    @staticmethod
    def _read(path: Path, key: str) -> bytes | None:
        entry = read_own(path)
        if entry is None or not entry.startswith(_MARK):
            return None
        begin = len(_MARK) + _DIGEST().digest_size
        code = entry[begin:]
        return code if code and entry[len(_MARK) : begin] == _DIGEST(key.encode() + code).digest() else None

    @staticmethod
    def _write(path: Path, key: str, code: bytes) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kqprefill-", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_MARK + _DIGEST(key.encode() + code).digest() + code)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError:
            pass  # a full disk or a read-only home costs a compile at the next start, nothing more


def ignored_variables() -> list[str]:
    """The environment variables of a cache folder that do not count, each in a line."""
    names = ("KQPREFILL_CACHE_DIR", "XDG_CACHE_HOME")
    return [
        f"{name} is {os.environ[name]!r}, which is no absolute path: it is ignored"
        for name in names
        if os.environ.get(name) and not os.path.isabs(os.environ[name])
    ]


def _cache_folder() -> Path | None:
    """Where entries are kept; None where no absolute path says so."""
    own, caches = (os.environ.get(name, "") for name in ("KQPREFILL_CACHE_DIR", "XDG_CACHE_HOME"))
    if os.path.isabs(own):
        return Path(own)
    if os.path.isabs(caches):
        return Path(caches, "kqprefill")
    home = home_folder()
    return None if home is None else home / ".cache" / "kqprefill"


def _is_entry(path: Path) -> bool:
    """Whether a file is an entry of ours, or of version 0.1, which began with the code's digest."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(path, "rb") as file:
            begin = file.read(_DIGEST().digest_size)
            return begin.startswith(_MARK) or _DIGEST(file.read()).digest() == begin
    except OSError:
        return False
