"""Text to token ids, by the vocabulary that a GGUF carries."""

from .tokenizer import Tokenizer

__all__ = ["Tokenizer"]
