"""Text to token ids as llama.cpp makes them: special tokens are found first, and what lies between them is encoded
by the vocabulary's kind of BPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import InputError, ModelError
from ..gguf.keys import read_key
from ..gguf.vocabulary import token_bytes
from .bpe import ADDS_BOS, BytePairs
from .pairs import CharacterPairs
from .sentencepiece import NoTokenError, SentencePieces

# Special tokens: (text, id), those with the longest texts first.
_Specials: TypeAlias = Sequence[tuple[str, int]]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type: llama.cpp's llama_token_type
# Tokens that are special by their text, since some converters forget to mark them (llama.cpp, too, knows them by it):
# those that end a text or a turn, and those for filling code in.
_UNMARKED = frozenset(
    "</s> <eos> [EOS] <EOT> _<EOT> [EOT] <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> "
    "<end_of_turn> <turn|> <end_of_utterance> <|return|> <|call|> <|calls|> <|flush|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[ <|channel|> <|message|> <|start|> <|constrain|> "
    "<PRE> <SUF> <MID> <PAD> <REPO> [PAD] ▁<PRE> ▁<SUF> ▁<MID> "
    "<fim-prefix> <fim-suffix> <fim-middle> <fim-pad> <fim-repo> "
    "<fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <reponame> "
    "<|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> <|fim_repo|> <|repo_name|> <|file_sep|> "
    "<|code_prefix|> <|code_suffix|> <|code_middle|> "
    "<|prefix|> <|suffix|> <|middle|> <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>".split()
)


class Tokenizer:
    """A file's own way from text to token ids. bos: the token that texts begin with, or None."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        """metadata: a GGUF's. path: the file's, for messages.

        Raises ModelError where the file has no vocabulary, or one of a kind that is not supported; InputError where a
        library is missing.
        """
        self._metadata, self._path = metadata, path
        self._bpe: SentencePieces | BytePairs
        kind = self._key("model")
        self._pieces: list[str] = self._key("tokens", [])
        if kind is None or not self._pieces:
            raise self._error("it has no vocabulary (tokenizer.ggml.model and tokens): it takes token ids, not text")
        types = self._list("token_type", [_NORMAL] * len(self._pieces))
        if kind == "llama":
            self._bpe = SentencePieces(self._pieces, self._list("scores", [0.0] * len(self._pieces)))
            add_bos, self._space_prefix = True, self._key("add_space_prefix", True)
        elif kind == "gpt2":
            pre = self._key("pre", "default")
            self._bpe = BytePairs(self._pieces, self._key("merges", []), pre, self._error)
            add_bos, self._space_prefix = pre in ADDS_BOS, False
        elif kind == "gemma4":
            self._bpe = CharacterPairs(self._pieces, self._key("merges", []))
            add_bos, self._space_prefix = True, False
        else:
            known = "'llama', 'gpt2' and 'gemma4' are supported"
            raise self._error(f"its vocabulary is of kind {kind!r}; {known}: without one it takes token ids, not text")
        # GPT-2's kind may have no BOS, whatever it is that asks for one.
        has_bos = kind == "gemma4" or self._key("add_bos_token", add_bos)  # Gemma 4's always, whatever the file says
        self.bos = self._special("bos", None if kind == "gpt2" else -1) if has_bos else None
        self._eos = self._special("eos", -1) if self._key("add_eos_token", False) else None
        pieces = self._pieces
        unmarked = _UNMARKED
        if kind == "gemma4" and "<|tool_response>" in pieces:  # there `</s>` is a tag of HTML
            unmarked = _UNMARKED - {"</s>"}
            types = [_NORMAL if piece == "</s>" else t for piece, t in zip(pieces, types, strict=True)]
        marked = [i for i, t in enumerate(types) if t in (_UNKNOWN, _CONTROL, _USER_DEFINED) or pieces[i] in unmarked]
        self._specials = sorted(((pieces[i], i) for i in marked if pieces[i]), key=lambda piece: -len(piece[0]))
        self._special_ids = frozenset(token for _, token in self._specials)
        # What the texts of the others say is only text to whoever asks for that; these are part of how a text is read.
        self._always = [(text, i) for text, i in self._specials if types[i] == _USER_DEFINED and text not in _UNMARKED]
        self._control = [special for special in self._specials if special not in set(self._always)]
        # Phi-3's special tokens swallow the white space after them, but for those that are Llama's.
        name = read_key(metadata, "general.name", self._error, "").lower()
        swallow = {text for text, _ in self._specials} - {"<unk>", "<s>", "<|endoftext|>"}
        self._swallow = swallow if "phi-3" in name or "phi3" in name else frozenset()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """A text's token ids; special tokens' texts become these tokens.

        add_special: with the BOS and EOS that the file asks for. parse_special: False reads the texts of control tokens
        (`<start_of_turn>`) as plain text; tokens that the file calls user-defined (runs of spaces, tags) are always
        read as such (llama.cpp's parse_special). Raises InputError for what is no Unicode text, or has a character that
        no token stands for.
        """
        ids = [self.bos] if add_special and self.bos is not None else []
        ids += self._encode(text, self._specials if parse_special else self._always)
        if add_special and self._eos is not None:
            ids.append(self._eos)
        return ids

    def encode_rendered(self, text: str, mark: str = "") -> list[int]:
        """The ids of what a chat template has written, special tokens' texts being these tokens: with the BOS that the
        file asks for, unless it begins with one, and without EOS.

        mark: a character of `hider`, which is left out. Raises as `encode` does.
        """
        ids = self._encode(text, self._specials, mark)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def hider(self, mark: str) -> Callable[[str], str]:
        """hide(text): the text with a mark, one character, within each text of a control token, so that
        `encode_rendered` does not find it."""

        def hide(text: str) -> str:
            for special, _ in self._control:
                if special in text:
                    text = text.replace(special, special[0] + mark + special[1:])
            return text

        return hide

    def decode(self, ids: Sequence[int], add_special: bool = True) -> bytes:
        """The text that `encode` makes these ids of, in UTF-8 (ids may cut a character apart).

        add_special: a BOS before and an EOS after, which the file asks for, are left out. Raises InputError for what is
        no token.
        """
        return b"".join(self.pieces(ids, add_special))

    def pieces(self, ids: Sequence[int], add_special: bool = True) -> list[bytes]:
        """What each of the ids stands for in the text that `decode` gives; empty for what it leaves out."""
        first, end = 0, len(ids)
        if add_special and self.bos is not None and end and ids[0] == self.bos:
            first = 1
        if add_special and self._eos is not None and end > first and ids[-1] == self._eos:
            end -= 1
        specials, after_special = self._special_ids, True
        pieces = [b""] * len(ids)
        for at in range(first, end):
            token = ids[at]
            piece = token_bytes(self._metadata, token)
            if piece is None:
                raise InputError(f"token {token} is not in the vocabulary of {len(self._pieces)} tokens")
            if token not in specials and after_special and self._space_prefix:
                piece = piece.removeprefix(b" ")
            after_special = token in specials
            pieces[at] = piece
        return pieces

    def named(self, name: str) -> str:
        """The text of the token that the file calls "bos" or "eos"; empty where it names none."""
        token: int | None = self._key(f"{name}_token_id")
        return self._pieces[token] if token is not None and token < len(self._pieces) else ""

    def _encode(self, text: str, specials: _Specials, mark: str = "") -> list[int]:
        """The ids of a text in which these special tokens are looked for; mark: a character to leave out."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid UTF-8 at character {error.start}") from None
        ids: list[int] = []
        after_special = True
        for start, part in self._split(text, specials):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            prefix = " " if self._space_prefix and after_special else ""
            try:
                ids += self._bpe.encode(prefix + (part.replace(mark, "") if mark else part))
            except NoTokenError as error:
                at = start + error.at - len(prefix)
                which = f"{error.character!r}, character {at} of the text" if at >= 0 else "the space before a text"
                raise InputError(
                    f"{self._path}: its vocabulary has no token for {which}; leave it out, or give token ids"
                ) from None
            after_special = False
        return ids

    def _split(self, text: str, specials: _Specials) -> list[tuple[int, str | int]]:
        """The ids of the special tokens in a text, and the texts between them, each with the character that it begins
        at; longer ones are looked for first."""
        parts: list[tuple[int, str | int]] = [(0, text)] if text else []
        for special, token in specials:
            if special not in text:
                continue
            finer: list[tuple[int, str | int]] = []
            for start, part in parts:
                if isinstance(part, int) or special not in part:
                    finer.append((start, part))
                    continue
                first, *others = part.split(special)
                finer += [(start, first)] if first else []
                at = start + len(first)
                for other in others:
                    finer.append((at, token))
                    at += len(special) + len(other)
                    after = other.lstrip(" \t\n\v\f\r") if special in self._swallow else other
                    finer += [(at - len(after), after)] if after else []
            parts = finer
        return parts

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}")

    def _key(self, name: str, default: Any = None) -> Any:
        """The value of tokenizer.ggml.`name`, or the default where the file does not say."""
        return read_key(self._metadata, f"tokenizer.ggml.{name}", self._error, default)

    def _list(self, name: str, default: list[Any]) -> list[Any]:
        """The array tokenizer.ggml.`name`, which has an element for each token."""
        array: list[Any] = self._key(name, default)
        if len(array) != len(default):
            raise self._error(f"metadata tokenizer.ggml.{name} has {len(array)} values for {len(default)} tokens")
        return array

    def _special(self, name: str, default: int | None) -> int | None:
        """The token that is called "bos" or "eos"."""
        token: int | None = self._key(f"{name}_token_id", default)
        if token is not None and not 0 <= token < len(self._pieces):
            said = "missing" if token < 0 else f"{token}, no token of the vocabulary"
            raise self._error(f"metadata tokenizer.ggml.{name}_token_id is {said}")
        return token
