"""Text to token ids as llama.cpp makes them: special tokens are found first, and what lies between them is encoded
by the vocabulary's kind of BPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, ModelError
from .bpe import ADDS_BOS, BytePairs
from .sentencepiece import SentencePieces

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
        self._path = path
        self._bpe: SentencePieces | BytePairs
        kind = metadata.get("tokenizer.ggml.model")
        pieces = self._list(metadata, "tokens", None)
        types = self._list(metadata, "token_type", [_NORMAL] * len(pieces))
        if kind == "llama":
            self._bpe = SentencePieces(pieces, self._list(metadata, "scores", [0.0] * len(pieces)))
            add_bos, self._space_prefix = True, bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        elif kind == "gpt2":
            pre = metadata.get("tokenizer.ggml.pre", "default")
            self._bpe = BytePairs(pieces, self._list(metadata, "merges", []), pre, self._error)
            add_bos, self._space_prefix = pre in ADDS_BOS, False
        else:
            raise self._error(f"its vocabulary is of kind {kind!r}; 'llama' and 'gpt2' are supported: give --tokens")
        self.bos: int | None = None
        self._eos: int | None = None
        if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
            self.bos = self._special(metadata, "bos", len(pieces))
        if metadata.get("tokenizer.ggml.add_eos_token", False):
            self._eos = self._special(metadata, "eos", len(pieces))
        marked = [i for i, t in enumerate(types) if t in (_UNKNOWN, _CONTROL, _USER_DEFINED) or pieces[i] in _UNMARKED]
        self._specials = sorted(((pieces[i], i) for i in marked if pieces[i]), key=lambda piece: -len(piece[0]))
        # Phi-3's special tokens swallow the white space after them, but for those that are Llama's.
        name = str(metadata.get("general.name", "")).lower()
        swallow = {text for text, _ in self._specials} - {"<unk>", "<s>", "<|endoftext|>"}
        self._swallow = swallow if "phi-3" in name or "phi3" in name else frozenset()

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """A text's token ids; special tokens' texts become these tokens.

        add_special: with the BOS and EOS that the file asks for. Raises InputError for what is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid UTF-8 at character {error.start}") from None
        ids = [self.bos] if add_special and self.bos is not None else []
        after_special = True
        for part in self._split(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                ids += self._bpe.encode(" " + part if self._space_prefix and after_special else part)
                after_special = False
        if add_special and self._eos is not None:
            ids.append(self._eos)
        return ids

    def _split(self, text: str) -> list[str | int]:
        """The ids of the special tokens in a text, and the texts between them; longer ones are looked for first."""
        parts: list[str | int] = [text] if text else []
        for special, token in self._specials:
            if special not in text:
                continue
            finer: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or special not in part:
                    finer.append(part)
                    continue
                first, *others = part.split(special)
                finer += [first] if first else []
                for other in others:
                    finer.append(token)
                    after = other.lstrip(" \t\n\v\f\r") if special in self._swallow else other
                    finer += [after] if after else []
            parts = finer
        return parts

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}")

    def _list(self, metadata: Mapping[str, Any], name: str, default: list[Any] | None) -> list[Any]:
        """The array tokenizer.ggml.`name`; it must be as long as the default, if that has any elements."""
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise self._error("it has no vocabulary (tokenizer.ggml.tokens); give --tokens")
        array: list[Any] | None = (
            value if isinstance(value, list) else value.tolist() if hasattr(value, "tolist") else None
        )
        if array is None or (default and len(array) != len(default)):
            raise self._error(f"metadata tokenizer.ggml.{name} does not fit the vocabulary")
        return array

    def _special(self, metadata: Mapping[str, Any], name: str, n: int) -> int | None:
        """The token of a vocabulary of n that is called "bos" or "eos"; None where GPT-2's kind has no BOS."""
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None and name == "bos" and metadata.get("tokenizer.ggml.model") == "gpt2":
            return None
        if not isinstance(token, int) or not 0 <= token < n:
            raise self._error(f"metadata tokenizer.ggml.{name}_token_id is {token!r}, no token of the vocabulary")
        return token
