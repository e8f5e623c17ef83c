"""Models of a known shape with random, valid quantised weights, for benchmarks.

No file is needed, and none is written unless `write_gguf` is called.
"""

from .blocks import pool
from .file import SyntheticFile, SyntheticTensor
from .shapes import RECIPES, SHAPES, Shape
from .write import write_gguf

__all__ = ["RECIPES", "SHAPES", "Shape", "SyntheticFile", "SyntheticTensor", "pool", "write_gguf"]
