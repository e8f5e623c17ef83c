"""The programs of Mamba-2 and of convolutions by themselves, by their sizes, and the shapes of their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ...errors import ModelError
from .constants import DELTA_CHUNK
from .delta_kernels import padded_row
from .device.compiler import Program

SLICE = 32  # columns of a state that a block has
_STATE_SIZES = (64, 128, 256)  # in use
MOST_STATE = 256  # rows of a state


@cache
def inputs_program(kernel: int) -> Program:
    """mamba_inputs.cu, for convolutions of so many taps."""
    return Program("mamba_inputs.cu", (("KERNEL", str(kernel)),))


@cache
def convolution_program(kernel: int) -> Program:
    """convolution.cu, for so many taps."""
    return Program("convolution.cu", (("KERNEL", str(kernel)),))


@dataclass(frozen=True)
class ScanConfig:
    """The constants of mamba_scan.cu: rows of a state, and stages of what a block goes through."""

    state: int
    stages: int

    @property
    def program(self) -> Program:
        """What it is compiled to."""
        constants = (("STATE", str(self.state)), ("SLICE", str(SLICE)), ("STAGES", str(self.stages)))
        return Program("mamba_scan.cu", constants, 128 * (SLICE // 32), self._shared_bytes)

    @property
    def _shared_bytes(self) -> int:
        rows = 2 * padded_row(self.state) + padded_row(DELTA_CHUNK) + padded_row(SLICE) + 4
        return self.stages * DELTA_CHUNK * rows + (self.state + DELTA_CHUNK) * padded_row(SLICE)


def padded_head(head_dim: int) -> int:
    """Columns of a head of x, in whole slices."""
    return -(-head_dim // SLICE) * SLICE


@cache
def scan_config(state: int, shared_memory: int, alone: bool) -> ScanConfig:
    """The configuration for states of so many rows, in this much shared memory (bytes) of a block: with two stages
    where a block has a multiprocessor alone; elsewhere with one, so that more of them share it. Raises ModelError for
    states that the kernel does not take."""
    if state % 16 or state > MOST_STATE:
        raise ModelError(
            f"Mamba-2 with ssm.state_size {state} is not supported on CUDA (multiples of 16 up to {MOST_STATE} are); "
            "use --backend cpu"
        )
    for stages in (2, 1) if alone else (1,):
        config = ScanConfig(state, stages)
        if config.program.shared_bytes <= shared_memory:
            return config
    raise ModelError(f"Mamba-2 with ssm.state_size {state} wants more shared memory than this GPU has: --backend cpu")


def mamba_programs() -> Iterator[Program]:
    """All that models in use may need."""
    yield inputs_program(4)
    yield convolution_program(3)
    for state in _STATE_SIZES:
        for stages in (2, 1):
            yield ScanConfig(state, stages).program
