"""The ops on a GPU: each launches its kernels and returns at once; what the head returns waits.

Operands of the matrix units are halves under power-of-two scales that bounds prove safe (kernels/scales.cu); the
residual stream and all sums are float32.
"""

from __future__ import annotations

from .altup import AltUpOps
from .convolution import ConvolutionOps
from .delta import DeltaOps
from .experts import ExpertOps
from .head import HeadOps
from .kda import KdaOps
from .latent import LatentOps
from .mamba import MambaOps


class CudaOps(LatentOps, DeltaOps, KdaOps, MambaOps, ConvolutionOps, ExpertOps, AltUpOps, HeadOps):
    """The operations of one batch."""
