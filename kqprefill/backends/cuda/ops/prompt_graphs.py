"""Prompts whose launches are a CUDA graph, with the ops that made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ....core import Batch
from ..device.graphs import Graphs
from .batch import Residual
from .cuda_ops import CudaOps


@dataclass(frozen=True)
class Launched:
    """A batch's ops, and its residual stream after the last layer."""

    ops: CudaOps
    x: Residual


class PromptGraphs(Graphs):
    """Graphs of prompts' launches through the layers, each `Launched`.

    To make a batch's ops takes the host longer than to launch its graph, while the GPU has nothing to do: so the ops
    that were captured go on with the next prompt of the length.
    """

    def begin_again(self, batch: Batch, last_alone: bool) -> Launched | None:
        """What was captured of a prompt of this one's length, of which as much was asked, begun with this one; None
        where there is no graph."""
        found = cast("Launched | None", self.captured(len(batch.tokens), last_alone))
        if found is None or found.ops.batch.segments != batch.segments:
            return None
        found.ops.begin_again(batch)
        return found
