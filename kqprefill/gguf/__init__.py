"""GGUF files: the lazy reader, ggml's types and their dequantisation."""

from .dequantize import dequantize
from .model_file import ModelFile, ModelTensor
from .reader import GGUFFile, Tensor

__all__ = ["GGUFFile", "ModelFile", "ModelTensor", "Tensor", "dequantize"]
