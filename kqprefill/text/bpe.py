"""Byte-level BPE as GPT-2, Llama 3 and Qwen use it.

It goes through the `tokenizers` library, an extra: pip install 'kqprefill[text]'. A text is first cut into words by the
patterns of the model's own tokenizer, which GGUF names (tokenizer.ggml.pre).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import InputError, ModelError
from ..gguf.vocabulary import byte_pieces
from .sentencepiece import NoTokenError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_CASED = (
    rf"{_WORD}{_UPPER}*{_LOWER}+%s|{_WORD}{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = r"[一-龥ࠀ-一가-퟿&&\S]+"
# Letters with case that DeepSeek's first tokenizer does not know: Armenian, Georgian, those of mathematics and others.
_NO_CASED = (
    "\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001df1e"
)
# Han characters, as llama.cpp knows them (unicode_cpt_is_han).
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
# Ways of cutting a text into words: patterns that are used one after another, each cutting what the one before left.
_PATTERNS = {
    "gpt2": [_GPT2],
    "digits": [r"\p{N}", _GPT2],
    "llama3": [_LLAMA3],
    "qwen2": [_QWEN2],
    "qwen35": [
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    # llama.cpp's own: Moonshot's pattern (tokenization_kimi.py) also parts words where capitals begin, and joins marks.
    "kimi-k2": [
        rf"[{_HAN}]+|{_WORD}[\p{{L}}&&[^{_HAN}]]+(?:'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL]))?|\p{{N}}{{1,3}}" + _REST
    ],
    "tekken": [_CASED % ("", "", "")],
    "gpt4o": [_CASED % (_CONTRACTION + "?", _CONTRACTION + "?", "{1,3}")],
    "tiny-aya": [r"\d{1,3}(?=(?:\d{3})*\b)", _CASED % (_CONTRACTION + "?", _CONTRACTION + "?", "{1,3}")],
    "deepseek3": [
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NO_CASED}]]+",
        r"\s?[!-/:-~！-／：-～‘-‟、。]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"],
    "seed-coder": [_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
# Each way's names in GGUF: values of tokenizer.ggml.pre.
_NAMES = {
    "gpt2": "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum roberta-bpe mpt olmo jais "
    "trillion granite-docling exaone4",
    "digits": "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    "llama3": "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4 glm5",
    "qwen2": "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2",
    "qwen35": "qwen35",
    "kimi-k2": "kimi-k2",
    "tekken": "tekken",
    "gpt4o": "gpt-4o llama4 kanana2 minimax-m2",
    "tiny-aya": "tiny_aya cohere2moe",
    "deepseek3": "deepseek-v3 hunyuan-dense joyai-llm",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "seed-coder": "seed-coder",
    "falcon": "falcon",
    "default": "default",
}
_PATTERNS_OF = {name: _PATTERNS[way] for way, names in _NAMES.items() for name in names.split()}
_LLAMA3_NAMES = frozenset("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2".split())
_WHOLE_WORDS = _LLAMA3_NAMES | {"tekken", "glm4", "glm5"}  # words that are tokens are not merged
ADDS_BOS = _LLAMA3_NAMES | {"tekken"}  # where the file does not say


class BytePairs:
    """A vocabulary of byte-level BPE."""

    def __init__(
        self, pieces: Sequence[str], merges: Sequence[str], pre: str, error: Callable[[str], ModelError]
    ) -> None:
        """pieces: the vocabulary in GPT-2's spelling of bytes. merges: "left right", the most frequent first. pre: the
        name of the patterns. error(what): makes the exception for a file that cannot be used.

        Raises that, and InputError where the tokenizers library is needed and missing.
        """
        if pre not in _PATTERNS_OF:
            raise error(
                f"its pre-tokenizer {pre!r} is not supported ({', '.join(sorted(_PATTERNS_OF))} are): it takes token "
                "ids, not text"
            )
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        self._pieces = pieces
        # Bytes without a token of their own: the library leaves them out without a word.
        self._missing = frozenset(byte for byte, piece in enumerate(byte_pieces()) if piece not in vocabulary)
        # Each byte's token, where there are no merges (the example's vocabulary): that needs no library. Else [].
        self._bytes: list[int] = []
        is_merged = any(merge.replace(" ", "") in vocabulary for merge in merges)  # into a token: others count for none
        if not is_merged and pre not in _WHOLE_WORDS and all(piece in vocabulary for piece in byte_pieces()):
            self._bytes = [vocabulary[piece] for piece in byte_pieces()]
            return
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        except ImportError:
            raise InputError("this vocabulary needs the tokenizers library: pip install 'kqprefill[text]'") from None
        pairs = []
        for merge in merges:
            at = merge.find(" ", 1)
            left, right = merge[:at], merge[at + 1 :]
            if at > 0 and right and left in vocabulary and right in vocabulary and left + right in vocabulary:
                pairs.append((left, right))
        self._tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS_OF[pre]]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])

    def encode(self, text: str) -> list[int]:
        """A text's token ids. Special tokens are not looked for.

        Raises NoTokenError for a character of which a byte has no token.
        """
        if self._bytes:
            return [self._bytes[byte] for byte in text.encode()]
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._missing and not self._missing.isdisjoint(text.encode()):
            self._refuse_losses(text, ids)
        return ids

    def _refuse_losses(self, text: str, ids: list[int]) -> None:
        """Hold the tokens' spellings against the text's (a word may be a token though its bytes are none)."""
        spelling = byte_pieces()
        spelled, at = "".join(spelling[byte] for byte in text.encode()), 0
        for token in ids:
            if not spelled.startswith(self._pieces[token], at):
                break
            at += len(self._pieces[token])
        if at < len(spelled):
            character = len(text.encode()[:at].decode("utf-8", "ignore"))
            raise NoTokenError(character, text[character])
