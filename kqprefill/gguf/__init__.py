"""GGUF files: the lazy reader, ggml's types and their dequantisation."""

from .dequantize import dequantize
from .reader import GGUFFile, Tensor

__all__ = ["GGUFFile", "Tensor", "dequantize"]
