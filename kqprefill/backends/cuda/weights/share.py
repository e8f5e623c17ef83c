"""Which of a model's layers a device runs, and what else it therefore holds."""

from __future__ import annotations

from dataclasses import dataclass

from ....gguf import ModelTensor
from ....models.family import Family


@dataclass(frozen=True)
class Share:
    """The layers that one device runs, of a model with so many: all of them, or some that follow one another."""

    layers: range
    count: int

    @classmethod
    def whole(cls, family: Family) -> Share:
        """All layers, on one device."""
        count = len(family.blocks)
        return cls(range(count), count)

    def __str__(self) -> str:
        return f"layers {self.layers.start} to {self.layers.stop - 1}"

    @property
    def is_first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the output matrix."""
        return self.layers.stop == self.count

    def outside(self, family: Family) -> list[ModelTensor]:
        """The matrices outside the layers that always stay: the output, and what else is multiplied by."""
        output = [family.output] if self.is_last else []
        return [w.tensor for w in (*output, *family.other_matrices())]

    def embeds_from_host(self, family: Family, streaming: bool) -> bool:
        """Whether it looks tokens up in the embedding (it has the first layers, or its layers take embeddings of their
        own, which are made of the others), and that is not on the device. streaming: whether layers are streamed."""
        embeds = self.is_first or family.row_table() is not None
        return embeds and not self._multiplies_by_embedding(family) and (streaming or not self.is_first)

    def holds_embedding(self, family: Family) -> bool:
        """Whether the embedding is a matrix of its own here, beside those that `outside` names; where layers are
        streamed its rows come from the host."""
        return self.is_first and not self._multiplies_by_embedding(family)

    def _multiplies_by_embedding(self, family: Family) -> bool:
        """Whether the embedding is the output matrix, which is here and always stays."""
        return self.is_last and family.output is family.token_embd
