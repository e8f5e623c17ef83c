"""Token ids to text, as the file's vocabulary spells it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
import re
from typing import Any

from .keys import key_or_none

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def byte_pieces() -> tuple[str, ...]:
    """GPT-2's spelling of the 256 bytes: printable characters stand for themselves, the rest for U+0100 onwards."""
    shifted = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return tuple(chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256))


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of GPT-2's spelling stands for."""
    return {character: byte for byte, character in enumerate(byte_pieces())}


def token_bytes(metadata: Mapping[str, Any], token: int) -> bytes | None:
    """The bytes that one token stands for, or None where the file has no vocabulary or the token is beyond it."""
    pieces: list[str] = key_or_none(metadata, "tokenizer.ggml.tokens") or []
    if not 0 <= token < len(pieces):
        return None
    piece = pieces[token]
    if key_or_none(metadata, "tokenizer.ggml.model") == "gpt2":  # byte-level BPE
        byte_of = _byte_of()
        if all(character in byte_of for character in piece):
            return bytes(byte_of[character] for character in piece)
        return piece.encode()
    if match := _BYTE.fullmatch(piece):  # SentencePiece's byte fallback
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()


def token_text(metadata: Mapping[str, Any], token: int) -> str | None:
    """The text of one token, or None where `token_bytes` is. Bytes that are no UTF-8 by themselves become U+FFFD."""
    spelled = token_bytes(metadata, token)
    return None if spelled is None else spelled.decode("utf-8", "replace")
