"""What a kernel is launched with, read from its source: the names and types of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
import re
import struct

import numpy as np

from .arrays import FLOAT16, FLOAT32, FLOAT64, INT8, INT32, UINT8, UINT32, DeviceArray
from .compiler import text_of

# What a launch passes by a parameter's name. None is a null pointer, and an int may stand for an address.
Argument = DeviceArray | int | float | None

# The dtype that a pointer's array must have; pointers to other types take any (a tensor map, 16 bytes at a time).
_POINTERS: dict[str, np.dtype] = {
    "float": FLOAT32,
    "float2": FLOAT32,
    "double": FLOAT64,
    "half_t": FLOAT16,
    "int": INT32,
    "int2": INT32,
    "Group": INT32,
    "QueryTile": INT32,
    "Chunk": INT32,
    "Sequence": INT32,
    "int8_t": INT8,
    "uint8_t": UINT8,
    "uint32_t": UINT32,
}
# How a value is written into its eight bytes, and how many bytes of them the kernel takes.
_VALUES = {"int": ("i4x", 4), "float": ("f4x", 4), "uint64_t": ("Q", 8)}

_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\s*\(([^)]*)\)')
_PARAMETER = re.compile(r"(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel. dtype: of the array that a pointer points to, None where any will do."""

    name: str
    is_pointer: bool
    format: str
    nbytes: int
    dtype: np.dtype | None


class Signature:
    """A kernel's parameters, in order."""

    def __init__(self, kernel: str, parameters: tuple[Parameter, ...]) -> None:
        self.kernel, self.parameters = kernel, parameters
        self.names = tuple(parameter.name for parameter in parameters)
        self.packer = struct.Struct("<" + "".join(parameter.format for parameter in parameters))

    def values(self, arguments: Mapping[str, Argument]) -> list[int | float]:
        """The arguments' values in the kernel's order, addresses for arrays. Raises TypeError for wrong names."""
        if len(arguments) != len(self.names):
            raise self._wrong_names(arguments)
        try:
            given = [arguments[name] for name in self.names]
        except KeyError:
            raise self._wrong_names(arguments) from None
        return [v.address if type(v) is DeviceArray else 0 if v is None else v for v in given]  # type: ignore[misc]

    def check(self, arguments: Mapping[str, Argument]) -> None:
        """Raises TypeError where an argument is no value of its parameter's type, or an array of another dtype."""
        self.packer.pack(*self.values(arguments))
        for parameter in self.parameters:
            value = arguments[parameter.name]
            if isinstance(value, DeviceArray):
                fits = parameter.is_pointer and parameter.dtype in (None, value.dtype)
            elif parameter.is_pointer:
                fits = value is None or parameter.dtype is None
            else:
                fits = isinstance(value, (int, np.integer)) or (parameter.format[0] == "f" and isinstance(value, float))
            if not fits:
                raise TypeError(f"{self.kernel}: parameter {parameter.name} was given {value!r}")

    def _wrong_names(self, arguments: Mapping[str, Argument]) -> TypeError:
        missing, unknown = set(self.names) - set(arguments), set(arguments) - set(self.names)
        return TypeError(f"{self.kernel}: parameters not given: {sorted(missing)}; not known: {sorted(unknown)}")


@cache
def signatures_of(source: str) -> dict[str, Signature]:
    """The signatures of a .cu file's kernels, by name."""
    text = re.sub(r"//[^\n]*", "", text_of(source))
    return {name: Signature(name, tuple(map(_parameter, listed.split(",")))) for name, listed in _KERNEL.findall(text)}


def _parameter(declared: str) -> Parameter:
    match = _PARAMETER.fullmatch(" ".join(declared.split()))
    if match is None:
        raise ValueError(f"a kernel's parameter is declared as {declared!r}, which is not understood")
    kind, pointer, name = match.groups()
    if pointer:
        return Parameter(name, True, "Q", 8, _POINTERS.get(kind))
    written, nbytes = _VALUES[kind]
    return Parameter(name, False, written, nbytes, dtype=None)
