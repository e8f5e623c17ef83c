"""The ops on a GPU: each launches its kernels and returns at once; what the head returns waits.

Operands of the matrix units are halves under power-of-two scales that bounds prove safe (kernels/scales.cu); the
residual stream and all sums are float32.
"""

from __future__ import annotations

from typing import Any

from .attention import AttentionOps
from .delta import DeltaOps
from .experts import ExpertOps
from .head import HeadOps
from .per_layer import PerLayerOps


class CudaOps(AttentionOps, DeltaOps, ExpertOps, PerLayerOps, HeadOps):
    """The operations of one batch."""

    def latent_attention(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError
