"""MiniCPM (arXiv 2404.06395): Granite's layers; files may lack the multipliers, which are then llama.cpp's."""

from __future__ import annotations

import math

from .granite import Granite


class MiniCpm(Granite):
    architecture = "minicpm"
    examples = "MiniCPM 2B, MiniCPM4 8B"

    def default_scales(self) -> tuple[float, float, float]:
        c = self.config
        return 12.0, 1.4 / math.sqrt(c.block_count), 256 / c.embedding_length
