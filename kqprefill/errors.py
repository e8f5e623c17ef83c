"""Errors a caller can meet. Each message is one line that names the file, tensor, token or option, and what to do."""

from __future__ import annotations

from .terminal import shown

# What is said of results that are not finite.
DAMAGED_WEIGHTS = "the file's weights are damaged or out of range"


class KqprefillError(Exception):
    """Base of every error that kqprefill raises on purpose.

    Names from a file may hold anything: what a terminal would obey is escaped (`shown`), so that a message is one line
    and moves no cursor.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))


class GGUFError(KqprefillError):
    """The file is not a GGUF that can be believed: damaged, truncated, contradictory or of an unknown version."""


class ModelError(KqprefillError):
    """The GGUF is sound, but its model cannot be run: unsupported architecture, missing or misshapen tensor."""


class StateError(KqprefillError):
    """The file is not a state that the model can go on from: damaged, of an unknown version, or another model's."""


class InputError(KqprefillError):
    """The caller's tokens or arguments are wrong: an id out of range, a prompt past the context length, ..."""


class BackendError(KqprefillError):
    """The device cannot do the work: no usable GPU, out of memory, a failed launch, NaN in the result."""
