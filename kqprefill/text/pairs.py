"""Gemma 4's BPE: merges of pairs as byte-level BPE has, over characters as SentencePiece has."""

from __future__ import annotations

from collections.abc import Sequence
import re

from .sentencepiece import SPACE, SentencePieces, join

_LINES = re.compile(r"[^\n]+|\n+")


class CharacterPairs(SentencePieces):
    """A vocabulary of characters and what merges make of them; what is no token becomes its UTF-8 bytes' tokens."""

    def __init__(self, pieces: Sequence[str], merges: Sequence[str]) -> None:
        """merges: "left right", the most frequent first; the left one may begin with a space."""
        super().__init__(pieces, ())
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            at = merge.find(" ", 1)
            if at > 0:
                self._ranks.setdefault((merge[:at], merge[at + 1 :]), rank)

    def encode(self, text: str) -> list[int]:
        """A text's token ids: of each run of newlines that is a token this one, and of what lies between by merges.

        Raises NoTokenError for a character that has not even bytes.
        """
        ids: list[int] = []
        for line in _LINES.finditer(text.replace(" ", SPACE)):
            whole = self._ids.get(line[0]) if line[0][0] == "\n" else None
            if whole is not None:
                ids.append(whole)
                continue
            symbols = list(line[0])
            join(symbols, lambda left, right: self._ranks.get((left, right)))
            ids += self._ids_of(symbols, line.start())
        return ids
