"""CUDA source to machine code through NVRTC, and a disk cache of what came out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
import hashlib
import os
from pathlib import Path
import re
import tempfile
from typing import TextIO

from ..constants import SHARED_DEFINES, THREADS
from .codebooks import definitions
from .gpu import cuda_errors, import_cuda

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')
_CACHE_VERSION = 3  # part of every key: raise it when the entries' layout, or the options, change
_DIGEST = hashlib.sha256
_ENTRY = re.compile(r"[0-9a-f]{64}\.(cubin|ptx)|tmp\w+\.tmp")


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

    An entry is its SHA-256 and the code, written to a temporary file and renamed: a reader sees all of it or nothing,
    two processes may write at once, and a damaged entry is compiled again. Where the folder cannot be written or is not
    the user's own, the cache is off and every start compiles.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        if folder is None:
            root = os.environ.get("KQPREFILL_CACHE_DIR")
            base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
            folder = root or os.path.join(base, "kqprefill")
        self.folder = Path(folder)

    def get(self, program: Program, target: Target) -> tuple[bytes, bool]:
        """(code, whether it came from the cache)."""
        path = self.folder / f"{self._key(program, target)}.{target.code_type}"
        code = self._read(path)
        if code is not None:
            return code, True
        code = compile_program(program, target)
        self._write(path, code)
        return code, False

    def held(self) -> tuple[int, int]:
        """(entries, bytes) on disk."""
        sizes = [path.stat().st_size for path in self._entries()]
        return len(sizes), sum(sizes)

    def clear(self) -> tuple[int, int]:
        """Remove all entries; (how many, their bytes). Raises OSError where one cannot be removed."""
        held = self.held()
        for path in self._entries():
            path.unlink(missing_ok=True)
        return held

    def why_off(self) -> str | None:
        """Why nothing is kept, in a line, or None."""
        if self.folder.exists() and not self._is_ours():
            return f"{self.folder} is not yours alone: chown it, and chmod go-w"
        parent = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        return None if os.access(parent, os.W_OK) else f"{parent} cannot be written; set KQPREFILL_CACHE_DIR"

    def _entries(self) -> Iterable[Path]:
        """Our own files, and what a killed process left of one; nothing else that may lie there."""
        if not self._is_ours():
            return []
        return [path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name)]

    def _key(self, program: Program, target: Target) -> str:
        from cuda.bindings import nvrtc

        compiler = nvrtc.nvrtcVersion()[1:]
        parts = _CACHE_VERSION, text_for(program), program.defines, compiler, target.code_type, target.arch
        return _DIGEST(repr(parts).encode()).hexdigest()

    def _is_ours(self) -> bool:
        try:
            status = self.folder.stat()
        except OSError:
            return False
        return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)

    def _read(self, path: Path) -> bytes | None:
        if not self._is_ours():
            return None
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        size = _DIGEST().digest_size
        return entry[size:] if len(entry) > size and _DIGEST(entry[size:]).digest() == entry[:size] else None

    def _write(self, path: Path, code: bytes) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_DIGEST(code).digest() + code)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError:
            pass  # a full disk or a read-only home costs a compile at the next start, nothing more
