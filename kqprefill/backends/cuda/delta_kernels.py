"""The programs of Gated DeltaNet and Kimi Delta Attention, by head dimension, and the shapes of their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ...errors import ModelError
from .constants import DELTA_CHUNK
from .device.compiler import Program

HEAD_DIMS = (32, 64, 128)  # that the kernels take
_PREPARE_THREADS = 256


def padded_row(values: int) -> int:
    """Bytes of a row of halves in shared memory, padded against bank conflicts."""
    return 2 * (values + 8)


@cache
def inputs_program(head_dim: int, kernel: int) -> Program:
    """delta_inputs.cu, for convolutions of so many taps. Raises ModelError for heads that it does not take."""
    if head_dim not in HEAD_DIMS:
        raise ModelError(
            f"recurrences with heads of {head_dim} are not supported on CUDA ({HEAD_DIMS} are); use --backend cpu"
        )
    return Program("delta_inputs.cu", (("HEAD_DIM", str(head_dim)), ("KERNEL", str(kernel))))


@cache
def prepare_program(head_dim: int) -> Program:
    """delta_prepare.cu."""
    shared_bytes = 2 * DELTA_CHUNK * padded_row(head_dim) + 4 * DELTA_CHUNK * (DELTA_CHUNK + 4) + 3 * 4 * DELTA_CHUNK
    return Program("delta_prepare.cu", (("HEAD_DIM", str(head_dim)),), _PREPARE_THREADS, shared_bytes)


@cache
def kda_program(head_dim: int) -> Program:
    """kda.cu, of Kimi Delta Attention."""
    return Program("kda.cu", (("HEAD_DIM", str(head_dim)),))


@dataclass(frozen=True)
class ScanConfig:
    """The constants of delta_scan.cu: columns of the state that a block has, and stages of what it goes through."""

    head_dim: int
    slice: int
    stages: int

    @property
    def slices(self) -> int:
        """Blocks of a head."""
        return self.head_dim // self.slice

    @property
    def program(self) -> Program:
        """What it is compiled to."""
        constants = (("HEAD_DIM", str(self.head_dim)), ("SLICE", str(self.slice)), ("STAGES", str(self.stages)))
        return Program("delta_scan.cu", constants, 128 * (self.slice // 32), self._shared_bytes)

    @property
    def _shared_bytes(self) -> int:
        rows = 3 * padded_row(self.head_dim) + padded_row(DELTA_CHUNK) + padded_row(self.slice) + 4
        return self.stages * DELTA_CHUNK * rows + (self.head_dim + 2 * DELTA_CHUNK) * padded_row(self.slice)


def _scan_configs(head_dim: int) -> list[ScanConfig]:
    """From the largest on."""
    return [ScanConfig(head_dim, *of) for of in ((64, 2), (32, 2), (32, 1)) if of[0] <= head_dim]


@cache
def scan_config(head_dim: int, shared_memory: int, heads: int, multiprocessors: int) -> ScanConfig:
    """The configuration for that many heads, of all sequences together: the largest that a block with this much shared
    memory (bytes) can have; narrow slices where there are multiprocessors for all of them at once."""
    fitting = [config for config in _scan_configs(head_dim) if config.program.shared_bytes <= shared_memory]
    narrow = (c for c in fitting if c.slice == 32 and heads * c.slices <= multiprocessors)
    return next(narrow, fitting[0])


def delta_programs() -> Iterator[Program]:
    """All that models in use may need."""
    for head_dim in HEAD_DIMS:
        yield inputs_program(head_dim, 4)
        yield prepare_program(head_dim)
        yield kda_program(head_dim)
        yield from (config.program for config in _scan_configs(head_dim))
