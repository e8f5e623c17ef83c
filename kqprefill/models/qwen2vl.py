"""Qwen 2 VL and 2.5 VL (arXiv 2409.12191), what reads text: Qwen 2's layers. Its rotary pairs turn by one of three
position axes, which are the same for text."""

from __future__ import annotations

from dataclasses import replace

from .config import Config
from .qwen2 import Qwen2


class Qwen2Vl(Qwen2):
    architecture = "qwen2vl"
    examples = "Qwen 2.5 VL 7B, Qwen 2 VL 72B"

    def read_config(self, vocab_size: int) -> Config:
        """Without an epsilon in the norms: llama.cpp does not read this architecture's."""
        return replace(super().read_config(vocab_size), norm_epsilon=0.0)

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.meta.integers("rope.dimension_sections", 4)
