"""Token ids as clients see them: each token's text, and where it begins in the text of all."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.model import Model
from ..gguf.vocabulary import token_bytes


class Texts:
    """Texts of tokens; `token_id:7` where the file has none for token 7, or where the client wants it so (vLLM)."""

    def __init__(self, model: Model, as_ids: bool = False) -> None:
        self._model, self._as_ids = model, as_ids
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """A token's text; bytes that are no UTF-8 by themselves become U+FFFD."""
        text = self._known.get(token)
        if text is None:
            spelled = None if self._as_ids else self._model.token_text(token)
            text = self._known[token] = f"token_id:{token}" if spelled is None else spelled
        return text

    def spelled(self, token: int) -> bytes:
        """What a token adds to a text that it does not begin; nothing where the file has no vocabulary."""
        return token_bytes(self._model.file.metadata, token) or b""

    def pieces(self, ids: Sequence[int], special: bool) -> list[bytes]:
        """What each token adds to the text (`Tokenizer.pieces`); nothing where the file has no vocabulary. Raises
        InputError for a token beyond it."""
        if self._model.token_text(0) is None:
            return [b""] * len(ids)
        return self._model.tokenizer().pieces(ids, special)


class Echo:
    """A sequence as a completion shows it: its text, its tokens' texts, and the character at which each begins.

    A token that begins within a character has that one's place. ids: a prompt's; made: what follows it. special: the
    BOS and EOS that the file asks for are among the prompt's, and are not part of the text.
    """

    def __init__(self, texts: Texts, ids: Sequence[int], made: Sequence[int], special: bool) -> None:
        pieces = texts.pieces(ids, special) + [texts.spelled(token) for token in made]
        self.text = b"".join(pieces).decode("utf-8", "replace")
        self.tokens = [texts.of(token) for token in (*ids, *made)]
        self.offsets: list[int] = []
        begun = 0  # characters that have begun
        for piece in pieces:
            within = bool(piece) and piece[0] & 0xC0 == 0x80
            self.offsets.append(max(0, begun - 1) if within else begun)
            begun += len(piece) if piece.isascii() else sum(byte & 0xC0 != 0x80 for byte in piece)
