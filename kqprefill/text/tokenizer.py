"""Text to token ids as llama.cpp makes them: special tokens are found first, and what lies between goes to the vocabulary's kind."""

from ..errors import InputError, ModelError
from .bpe import ADDS_BOS, BytePairs
from .sentencepiece import SentencePieces

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type: llama.cpp's llama_token_type
# Tokens that are special by their text, which some converters forget to mark (llama.cpp finds them so too): those that end a text or
# a turn, and those for filling code in.
_UNMARKED = frozenset(
    "</s> <eos> [EOS] <EOT> _<EOT> [EOT] <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <turn|> "
    "<end_of_utterance> <|return|> <|call|> <|calls|> <|flush|> <|tool_response> <｜end▁of▁sentence｜> [e~[ <|channel|> <|message|> "
    "<|start|> <|constrain|> <PRE> <SUF> <MID> <PAD> <REPO> [PAD] ▁<PRE> ▁<SUF> ▁<MID> <fim-prefix> <fim-suffix> <fim-middle> <fim-pad> "
    "<fim-repo> <fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <reponame> <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> "
    "<|fim_repo|> <|repo_name|> <|file_sep|> <|code_prefix|> <|code_suffix|> <|code_middle|> <|prefix|> <|suffix|> <|middle|> "
    "<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>".split()
)


class Tokenizer:
    """Made from a GGUF's metadata (a mapping); path is for errors. bos: the token that texts begin with, or None.

    Raises ModelError where the file has no vocabulary, or one of a kind that is not supported; InputError where a library is
    missing.
    """

    def __init__(self, metadata, path):
        self._path = path
        kind = metadata.get("tokenizer.ggml.model")
        pieces = self._list(metadata, "tokens", None)
        types = self._list(metadata, "token_type", [_NORMAL] * len(pieces))
        if kind == "llama":
            self._model = SentencePieces(pieces, self._list(metadata, "scores", [0.0] * len(pieces)))
            add_bos, self._space_prefix = True, bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        elif kind == "gpt2":
            pre = metadata.get("tokenizer.ggml.pre", "default")
            self._model = BytePairs(pieces, self._list(metadata, "merges", []), pre, self._error)
            add_bos, self._space_prefix = pre in ADDS_BOS, False
        else:
            raise self._error(f"its vocabulary is of kind {kind!r}; 'llama' and 'gpt2' are supported: give --tokens")
        self.bos = (
            self._special(metadata, "bos", len(pieces))
            if metadata.get("tokenizer.ggml.add_bos_token", add_bos)
            else None
        )
        self._eos = (
            self._special(metadata, "eos", len(pieces)) if metadata.get("tokenizer.ggml.add_eos_token", False) else None
        )
        marked = [i for i, t in enumerate(types) if t in (_UNKNOWN, _CONTROL, _USER_DEFINED) or pieces[i] in _UNMARKED]
        self._specials = sorted(((pieces[i], i) for i in marked if pieces[i]), key=lambda piece: -len(piece[0]))
        # Phi-3's special tokens swallow the white space after them, but for those that are Llama's.
        name = str(metadata.get("general.name", "")).lower()
        swallow = {text for text, _ in self._specials} - {"<unk>", "<s>", "<|endoftext|>"}
        self._swallow = swallow if "phi-3" in name or "phi3" in name else frozenset()

    def encode(self, text, add_special=True):
        """Token ids (list) of a text; add_special: with the BOS and EOS that the file asks for. Special tokens' texts become
        these tokens. Raises InputError for what is no Unicode text."""
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
                ids += self._model.encode(" " + part if self._space_prefix and after_special else part)
                after_special = False
        return ids + [self._eos] if add_special and self._eos is not None else ids

    def _split(self, text):
        """Special tokens' ids, and the texts between them; longer special tokens are looked for first."""
        parts = [text] if text else []
        for special, token in self._specials:
            if special not in text:
                continue
            found = []
            for part in parts:
                if isinstance(part, int) or special not in part:
                    found.append(part)
                    continue
                first, *others = part.split(special)
                found += [first] if first else []
                for other in others:
                    found.append(token)
                    other = other.lstrip(" \t\n\v\f\r") if special in self._swallow else other
                    found += [other] if other else []
            parts = found
        return parts

    def _error(self, what):
        return ModelError(f"{self._path}: {what}")

    def _list(self, metadata, name, default):
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise self._error("it has no vocabulary (tokenizer.ggml.tokens); give --tokens")
        value = value if isinstance(value, list) else value.tolist() if hasattr(value, "tolist") else None
        if value is None or (default and len(value) != len(default)):
            raise self._error(f"metadata tokenizer.ggml.{name} does not fit the vocabulary")
        return value

    def _special(self, metadata, name, n):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None and name == "bos" and metadata.get("tokenizer.ggml.model") == "gpt2":
            return None
        if not isinstance(token, int) or not 0 <= token < n:
            raise self._error(f"metadata tokenizer.ggml.{name}_token_id is {token!r}, no token of the vocabulary")
        return token
