"""Qwen 3 VL (arXiv 2511.21631), what reads text: Qwen 3's layers. Its rotary pairs turn by one of several position
axes; a text's tokens have their position on the first three, and 0 on the fourth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .config import ArchMetadata, Rope
from .qwen3 import Qwen3
from .qwen3moe import Qwen3Moe


def text_rope(rope: Rope, meta: ArchMetadata) -> Rope:
    """The rotation of text by interleaved sections (ggml's GGML_ROPE_TYPE_IMROPE): a pair of the fourth axis does not
    turn.

    Section a's pairs are those of numbers a, a + 3, a + 6, ...; a pair that no section takes is the fourth's. Raises
    ModelError for sections that do not fit.
    """
    sections = meta.integers("rope.dimension_sections", 4)
    total = sum(sections)
    if not 0 < total <= 2 * len(rope.inv_freq):
        raise meta.error(f"rope.dimension_sections {sections} do not fit {len(rope.inv_freq)} pairs")
    place = np.arange(len(rope.inv_freq)) % total
    turns = np.zeros(len(place), bool)
    for axis in range(3):
        turns |= (place % 3 == axis) & (place < 3 * sections[axis])
    return replace(rope, inv_freq=np.where(turns, rope.inv_freq, 0.0))


class Qwen3Vl(Qwen3):
    """Qwen 3 VL (arXiv 2511.21631), what reads text: Qwen 3's layers, whose rotary pairs turn by one of several
    position axes.
    """

    architecture = "qwen3vl"
    examples = "Qwen 3 VL 8B, Qwen 3 VL 32B"

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.rope = text_rope(self.rope, self.meta)


class Qwen3VlMoe(Qwen3Moe):
    """Qwen 3 VL (arXiv 2511.21631) with experts, what reads text: Qwen 3's layers, whose rotary pairs turn by one of
    several position axes.
    """

    architecture = "qwen3vlmoe"
    examples = "Qwen 3 VL 30B-A3B, Qwen 3 VL 235B-A22B"

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.rope = text_rope(self.rope, self.meta)
