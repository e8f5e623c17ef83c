"""What the value of each metadata key is, stated once, and the reader that holds a file against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import KqprefillError
from ..terminal import shown

_LONGEST = 60  # characters of a value that a message repeats


@dataclass(frozen=True)
class Kind:
    """A kind of values: in words, and accept(value), which gives the value as callers want it, or None."""

    words: str
    accept: Callable[[Any], Any]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, np.ndarray):
        return None if value.size else []
    return value if isinstance(value, list) else None  # strings, since numbers come as NumPy arrays


def _numbers(value: Any, kinds: str) -> list[Any] | None:
    """The elements of an array of numbers whose dtype is of these kinds (NumPy's letters) and that has no NaN."""
    if isinstance(value, list) and not any(isinstance(element, str) for element in value):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return None
    fits = not value.size or (value.dtype.kind in kinds and not (value != value).any())
    return value.tolist() if fits else None


TEXT = Kind("a text", _text)
FLAG = Kind("true or false", _flag)
COUNT = Kind("an integer of 0 or more", _count)
TOKEN = Kind("a token's id", _count)
TEXTS = Kind("an array of texts", _texts)
INTEGERS = Kind("an array of integers", lambda value: _numbers(value, "iu"))
NUMBERS = Kind("an array of numbers", lambda value: _numbers(value, "iuf"))

# Those of an architecture (`<architecture>.*`) are stated where its page reads them: models.config.ArchMetadata.
KEYS = {
    "general.architecture": TEXT,
    "general.name": TEXT,
    "general.type": TEXT,
    "general.alignment": COUNT,
    "split.count": COUNT,
    "split.no": COUNT,
    "split.tensors.count": COUNT,
    "tokenizer.chat_template": TEXT,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.scores": NUMBERS,
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.bos_token_id": TOKEN,
    "tokenizer.ggml.eos_token_id": TOKEN,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.ggml.add_space_prefix": FLAG,
}


def read_key(metadata: Mapping[str, Any], key: str, error: Callable[[str], KqprefillError], default: Any = None) -> Any:
    """The value of a key of KEYS, of the kind stated there; the default where the file does not say.

    error(what): makes the exception that is raised for a value of another kind.
    """
    value = metadata.get(key)
    if value is None:
        return default
    accepted = KEYS[key].accept(value)
    if accepted is None:
        raise error(f"metadata {key} is {described(value)}, not {KEYS[key].words}")
    return accepted


def key_or_none(metadata: Mapping[str, Any], key: str) -> Any:
    """The value of a key of KEYS, or None where the file does not say, or says something of another kind."""
    value = metadata.get(key)
    return None if value is None else KEYS[key].accept(value)


def described(value: Any) -> str:
    """A value in few words, for messages."""
    if isinstance(value, np.ndarray) and value.ndim == 0:  # what np.asarray makes of a value that is no array
        value = value.item()
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)} {'values' if isinstance(value, list) else value.dtype.name}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = shown(repr(value[:_LONGEST] if isinstance(value, str) else value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
