"""CUDA source to machine code through NVRTC, and a disk cache of what came out."""

from dataclasses import dataclass
from functools import cache
import hashlib
import os
from pathlib import Path
import re
import tempfile

from ...errors import BackendError
from .codebooks import definitions
from .device import cuda_errors, import_cuda

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')
_CACHE_VERSION = 2  # part of every key: raise it when the entries' layout, or the options, change
_DIGEST = hashlib.sha256
_ENTRY = re.compile(r"[0-9a-f]{64}\.(cubin|ptx)|tmp\w+\.tmp")


def kernel_folder():
    """Where the .cu files are: in the installed package, or at the top of a source tree."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


@dataclass(frozen=True)
class Program:
    """A .cu file with its compile-time constants; its kernels are compiled together."""

    source: str
    defines: tuple[tuple[str, str], ...] = ()

    def __str__(self):
        return self.source + "".join(f" {name}={value}" for name, value in self.defines)


def flatten(path, seen=None):
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
def text_of(source):
    """The flattened text of a .cu file, read once: many programs differ in their constants alone."""
    return flatten(kernel_folder() / source)


def text_for(program):
    """What NVRTC compiles: the .cu file's text after the tables of the block formats that it is compiled for."""
    names = [name for key, value in program.defines if key in ("FORMAT", "FORMATS") for name in value.split(",")]
    return definitions(names) + text_of(program.source)


def target_of(capability):
    """(code type, architecture) to compile for: a CUBIN for exactly this GPU, or PTX where NVRTC does not know it.

    A CUBIN loads on any driver of its major version; PTX only on one as new as NVRTC (CUDA_ERROR_UNSUPPORTED_PTX_VERSION).
    """
    from cuda.bindings import nvrtc

    known = list(nvrtc.nvrtcGetSupportedArchs()[1])
    arch = capability[0] * 10 + capability[1]
    if arch in known:
        return "cubin", f"sm_{arch}" + ("a" if capability == (9, 0) else "")
    older = [a for a in known if a <= arch]
    if not older:
        raise BackendError(f"NVRTC cannot compile for compute capability {capability[0]}.{capability[1]}")
    return "ptx", f"compute_{max(older)}"


def compile_program(program, code_type, arch, logs=None):
    """Machine code (bytes) of a program. Raises BackendError with NVRTC's first complaint."""
    core, _ = import_cuda()
    options = core.ProgramOptions(
        name=program.source,
        arch=arch,
        std="c++17",
        define_macro=list(program.defines) or None,
        fma=False,  # fused where the source says so: left to the compiler, which outputs of a tile have it depends on their place
        ptxas_options=["-v"] if logs is not None else None,
    )
    with cuda_errors(f"compiling {program} for {arch}"):
        code = core.Program(text_for(program), "c++", options)
        return bytes(code.compile(code_type, logs=logs).code)


class KernelCache:
    """Compiled programs in the user's cache folder, keyed by source, constants, compiler and architecture.

    An entry is its SHA-256 and the code, written to a temporary file and renamed: a reader sees all of it or nothing,
    two processes may write at once, and a damaged entry is compiled again. Where the folder cannot be written or is not
    the user's own, the cache is off and every start compiles.
    """

    def __init__(self, folder=None):
        if folder is None:
            root = os.environ.get("KQPREFILL_CACHE_DIR")
            base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
            folder = root or os.path.join(base, "kqprefill")
        self.folder = Path(folder)

    def get(self, program, code_type, arch):
        """(code, whether it came from the cache)."""
        path = self.folder / f"{self._key(program, code_type, arch)}.{code_type}"
        code = self._read(path)
        if code is not None:
            return code, True
        code = compile_program(program, code_type, arch)
        self._write(path, code)
        return code, False

    def held(self):
        """(entries, bytes) on disk."""
        sizes = [path.stat().st_size for path in self._entries()]
        return len(sizes), sum(sizes)

    def clear(self):
        """Remove all entries; (how many, their bytes). Raises OSError where one cannot be removed."""
        held = self.held()
        for path in self._entries():
            path.unlink(missing_ok=True)
        return held

    def why_off(self):
        """Why nothing is kept, in a line, or None."""
        if self.folder.exists() and not self._is_ours():
            return f"{self.folder} is not yours alone: chown it, and chmod go-w"
        parent = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        return None if os.access(parent, os.W_OK) else f"{parent} cannot be written; set KQPREFILL_CACHE_DIR"

    def _entries(self):
        """Our own files, and what a killed process left of one; nothing else that may lie there."""
        if not self._is_ours():
            return []
        return [path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name)]

    def _key(self, program, code_type, arch):
        from cuda.bindings import nvrtc

        compiler = nvrtc.nvrtcVersion()[1:]
        return _DIGEST(
            repr((_CACHE_VERSION, text_for(program), program.defines, compiler, code_type, arch)).encode()
        ).hexdigest()

    def _is_ours(self):
        try:
            status = self.folder.stat()
        except OSError:
            return False
        return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)

    def _read(self, path):
        if not self._is_ours():
            return None
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        size = _DIGEST().digest_size
        return entry[size:] if len(entry) > size and _DIGEST(entry[size:]).digest() == entry[:size] else None

    def _write(self, path, code):
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
