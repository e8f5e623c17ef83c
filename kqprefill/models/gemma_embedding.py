"""EmbeddingGemma (arXiv 2509.20354): Gemma 3's layers, of which each token also sees the tokens after it; the vector is
the mean of the outputs, through two matrices where the file has them."""

from __future__ import annotations

import math

from .gemma3 import Gemma3
from .weights import Shapes, Weight


class GemmaEmbedding(Gemma3):
    architecture = "gemma-embedding"
    examples = "EmbeddingGemma 300M"
    both_ways = True

    def shared_shapes(self) -> Shapes:
        shapes, width = super().shared_shapes(), self.config.embedding_length
        for name in ("dense_2", "dense_3"):
            if self.meta.has(f"{name}_feat_out"):
                rows = self.meta.integer(f"{name}_feat_out")
                shapes[f"{name}?"] = (rows, width)
                width = rows
        return shapes

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        self.attention_scale = 1 / math.sqrt(self.config.head_dim)

    def window(self, index: int) -> int | None:
        """Half of what the metadata says are seen before a token, and as many after it."""
        both = super().window(index)
        return None if both is None else both // 2 + 1

    def projections(self) -> list[Weight]:
        return [w for name in ("dense_2", "dense_3") if (w := self.shared.get(name)) is not None]
