"""Text to token ids, by the vocabulary that a GGUF carries; conversations, by its chat template (`chat.py`)."""

from .tokenizer import Tokenizer

__all__ = ["Tokenizer"]
