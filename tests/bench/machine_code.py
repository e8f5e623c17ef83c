"""Whether two folders of kernels compile to the same machine code: what a change that only moves text has to show.

    python tests/bench/machine_code.py BEFORE_KERNELS_FOLDER [--arch sm_90a,sm_80] [--all] [--only TEXT]

Compiles every program of the project twice on one core, from the folder that is named and from this tree's, and
compares the sections of the two CUBINs that decide what runs. Prints a line for each program that differs, and a total.
Where CUDA's cuobjdump and nvdisasm are on PATH, the line has the numbers of instructions, registers and bytes of stack
(where spills would lie) before and after, and the first instruction that differs. Exits with 1 where a program differs.
Without --all it takes some of the block formats only, which ends in about three minutes.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

from kqprefill.backends.cuda.codebooks import definitions
from kqprefill.backends.cuda.compiler import Program, flatten
from kqprefill.backends.cuda.constants import SHARED_DEFINES
from kqprefill.backends.cuda.device import import_cuda
from kqprefill.backends.cuda.kernels import every_program
from kqprefill.backends.cuda.tiles import HOPPER_TILES, AttentionTile, GemmTile, HopperAttentionTile
from kqprefill.gguf.types import GGML

AFTER = Path(__file__).resolve().parents[2] / "kernels"
# Of each kind of format one or two: unquantised, of 32 weights, K-quants, from a grid, 4-bit floats, ternary.
SOME_FORMATS = {"F32", "BF16", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "IQ1_M", "MXFP4", "TQ1_0"}
ALL_TILES_OF = {"Q4_K", "Q4_K,Q6_K"}  # the formats for which gemm_sm90.cu is compiled with every tile
SOME_TOKENS = {"16", "128"}  # the tiles that it is compiled with for the others
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?;)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def is_representative(program: Program) -> bool:
    """Whether a program is among those that are compared without --all."""
    defines = dict(program.defines)
    if program.source == "weights.cu":
        return defines["FORMAT"] in SOME_FORMATS
    if program.source == "gemm_sm90.cu":
        formats = defines["FORMATS"]
        return formats in ALL_TILES_OF or (formats in SOME_FORMATS and defines["TOKENS"] in SOME_TOKENS)
    return True


def launch_defines(program: Program) -> dict[str, int]:
    """THREADS and SHARED_BYTES of a program with tiles that does not have them; nothing for the others."""
    defines = dict(program.defines)
    if "THREADS" in defines:
        return {}
    for kind in (GemmTile, AttentionTile, HopperAttentionTile):
        if program.source == kind.source:
            tile = kind(**{name: int(defines[name.upper()]) for name in kind.__dataclass_fields__})
            return {"THREADS": tile.threads, "SHARED_BYTES": tile.shared_bytes}
    if program.source != "gemm_sm90.cu":
        return {}
    wanted = [int(defines[name]) for name in ("GATED", "TOKENS", "WARPGROUPS", "TILES", "CLUSTER")]
    (hopper,) = (t for t in HOPPER_TILES if [t.gated, t.tokens, t.warpgroups, t.tiles, t.cluster] == wanted)
    types = tuple(GGML[name] for name in defines["FORMATS"].split(","))
    return {"THREADS": hopper.threads, "SHARED_BYTES": hopper.shared_bytes(types)}


@cache
def text_of(folder: Path, source: str) -> str:
    """A .cu file of a kernel folder with its includes in place."""
    return flatten(folder / source)


def compile_from(folder: Path, program: Program, arch: str) -> bytes:
    """The CUBIN of a program from a kernel folder, with the options of kqprefill/backends/cuda/compiler.py.

    It gets the defines that host and kernels share beside its own; a folder from before there were any does not mind.
    """
    core, _ = import_cuda()
    shared = {**SHARED_DEFINES, **launch_defines(program)}
    defines = {**{name: str(value) for name, value in shared.items()}, **dict(program.defines)}
    formats = [name for key in ("FORMAT", "FORMATS") for name in defines.get(key, "").split(",")]
    options = core.ProgramOptions(
        name=program.source, arch=arch, std="c++17", define_macro=list(defines.items()), fma=False
    )
    text = definitions(formats) + text_of(folder, program.source)
    return bytes(core.Program(text, "c++", options).compile("cubin").code)


def deciding_sections(cubin: bytes) -> dict[str, bytes | int]:
    """The sections of a CUBIN (a 64-bit ELF file) that decide what runs: the bytes of instructions and of the constants
    that the compiler made for them, of shared memory the size."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    sections: dict[str, bytes | int] = {}
    for name_at, _, _, _, offset, size in headers:
        name = cubin[names + name_at : cubin.index(b"\0", names + name_at)].decode()
        if name.startswith((".text.", ".nv.constant2", ".nv.constant3")):
            sections[name] = cubin[offset : offset + size]
        elif name.startswith(".nv.shared"):
            sections[name] = size
    return sections


def cuobjdump(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a CUBIN."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(["cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout


def difference(before: bytes, after: bytes) -> str:
    """What differs between two CUBINs, in a line: numbers, and the first instruction that is another."""
    if shutil.which("cuobjdump") is None:
        return "differs (cuobjdump on PATH would tell where)"
    listings = [_INSTRUCTION.findall(cuobjdump(cubin, "-sass")) for cubin in (before, after)]
    usage = [_USAGE.findall(cuobjdump(cubin, "-res-usage")) for cubin in (before, after)]
    first = next((i for i, pair in enumerate(zip(*listings)) if pair[0] != pair[1]), None)
    where = "no instruction" if first is None else f"first at {first}: {listings[0][first]} | {listings[1][first]}"
    said = [", ".join(f"{r} registers, stack {st}, shared {sh}" for r, st, sh in kernels) for kernels in usage]
    resources = said[0] if said[0] == said[1] else f"{said[0]} -> {said[1]}"
    return f"{len(listings[0])} -> {len(listings[1])} instructions, {resources}; {where}"


def main() -> int:
    """Compare, print, and return how the process exits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="a folder with the .cu files to compare with")
    parser.add_argument("--arch", default="sm_90a,sm_80", help="architectures, comma-separated (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every program, not only some of the block formats")
    parser.add_argument("--only", default="", metavar="TEXT", help="only programs with this text in their names")
    arguments = parser.parse_args()
    if not (arguments.before / "norm.cu").is_file():
        parser.error(f"{arguments.before} has no kernels")
    began, compared, differing = time.monotonic(), 0, 0
    for arch in arguments.arch.split(","):
        for program in every_program(arch):
            if arguments.only not in str(program) or not (arguments.all or is_representative(program)):
                continue
            before, after = (compile_from(folder, program, arch) for folder in (arguments.before, AFTER))
            compared += 1
            if deciding_sections(before) != deciding_sections(after):
                differing += 1
                print(f"{arch} {program}: {difference(before, after)}", flush=True)
    print(f"{compared} programs compared, {differing} differ, {time.monotonic() - began:.0f} s")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
