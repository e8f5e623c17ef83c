"""Command R7B and Command A (Cohere, arXiv 2504.00698): Command R's layers, three of four with a sliding window and
rotation, the fourth with neither."""

from __future__ import annotations

from .command_r import CommandR
from .config import Rope


class Cohere2(CommandR):
    architecture = "cohere2"
    examples = "Command A 111B, Command R7B"
    norms_heads = False

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.sliding_window = self.meta.integer("attention.sliding_window")
        self.pattern = self.meta.integer("attention.sliding_window_pattern", 4)

    def window(self, index: int) -> int | None:
        return None if (index + 1) % self.pattern == 0 else self.sliding_window

    def rope_of(self, index: int) -> Rope | None:
        return None if self.window(index) is None else self.rope
