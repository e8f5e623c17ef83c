"""SentencePiece's BPE as Llama, Mistral, Gemma and Phi 3 use it.

A text's characters are the first symbols. Of all neighbouring symbols that together are a piece of the vocabulary,
those whose piece has the highest score are joined to one symbol, again and again until there are none. This is our own
code, since no library breaks ties as ggml does (llm_tokenizer_spm): the leftmost of equals is joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

SPACE = "\u2581"


class NoTokenError(Exception):
    """A vocabulary has nothing for a character, neither a piece nor its bytes nor an unknown token.

    at: the character's place in the text. character: the character itself.
    """

    def __init__(self, at: int, character: str) -> None:
        super().__init__(at, character)
        self.at, self.character = at, character


def join(symbols: list[str], rank: Callable[[str, str], float | None]) -> None:
    """Join neighbours to one symbol, those of the lowest rank first and the leftmost of equals, until none have a rank;
    a symbol that has been joined to the one before it is left as "".

    rank(left, right): that of two neighbours, or None where they stay apart.
    """
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]  # each symbol's neighbours
    heap: list[tuple[float, int, int, int]] = []  # what may be joined: (rank, left symbol, right symbol, length)

    def consider(left: int, right: int) -> None:
        """Put these neighbours on the heap if they have a rank; -1: there is no such neighbour."""
        if left >= 0 and right >= 0:
            found = rank(symbols[left], symbols[right])
            if found is not None:
                heappush(heap, (found, left, right, len(symbols[left]) + len(symbols[right])))

    for right in range(1, len(symbols)):
        consider(right - 1, right)
    while heap:
        _, left, right, length = heappop(heap)
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue  # one of them has been joined to another since
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = following = after[right]
        if following >= 0:
            before[following] = left
        consider(before[left], left)
        consider(left, following)


class SentencePieces:
    """A vocabulary of SentencePiece's."""

    def __init__(self, pieces: Sequence[str], scores: Sequence[float]) -> None:
        """scores: of each piece."""
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._scores = scores
        self._bytes = [self._ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte))) for byte in range(256)]
        self._unknown = self._ids.get("<unk>")

    def encode(self, text: str) -> list[int]:
        """A text's token ids; characters without a piece become their UTF-8 bytes' tokens.

        Raises NoTokenError for one that has not even these.
        """
        ids, scores = self._ids, self._scores

        def rank(left: str, right: str) -> float | None:
            token = ids.get(left + right)
            return None if token is None else -scores[token]

        symbols = list(text.replace(" ", SPACE))
        join(symbols, rank)
        return self._ids_of(symbols)

    def _ids_of(self, symbols: Sequence[str], start: int = 0) -> list[int]:
        """The ids of symbols, each of which stands where its first character stood; start: of the first in the text."""
        encoded: list[int] = []
        for at, symbol in enumerate(symbols):
            if symbol:
                token = self._ids.get(symbol)
                encoded += [token] if token is not None else self._of_bytes(symbol, start + at)
        return encoded

    def _of_bytes(self, symbol: str, at: int) -> list[int]:
        """The tokens of a symbol's UTF-8 bytes; the unknown token for a byte without."""
        tokens = []
        for byte in symbol.encode():
            token = self._bytes[byte]
            token = self._unknown if token is None else token
            if token is None:
                raise NoTokenError(at, symbol[0].replace(SPACE, " "))
            tokens.append(token)
        return tokens
