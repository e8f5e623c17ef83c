"""kqprefill: prefill of GGUF language models at the rate of the GPU's matrix units.

with kqprefill.load("model.gguf") as model:
    result = model.prefill([1, 2, 3], logits="last")
    print(result.token, result.logit)
"""

from __future__ import annotations

from collections.abc import Callable
import os
from typing import TYPE_CHECKING

from .errors import BackendError, GGUFError, InputError, KqprefillError, ModelError

if TYPE_CHECKING:
    from .backends.budget import Budget
    from .core import Progress
    from .engine.model import Model

__version__ = "0.2.0"
__all__ = ["BackendError", "GGUFError", "InputError", "KqprefillError", "ModelError", "__version__", "load"]


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: int = 0,
    kernels: str = "auto",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    vram: Budget | str | int | None = None,
    max_tokens: int | None = None,
) -> Model:
    """Open a GGUF model and make it ready to prefill.

    backend: "auto" (CUDA where usable, else the CPU, said in one line on stderr), "cuda" or "cpu". device: the CUDA
    device's number. kernels: "auto", or "portable" for the kernels of every GPU on one that has its own.
    vram: the GPU memory that may be taken, all told: bytes, "8G" or "75%"; None for all that is free. Layers that have
    no room in it are streamed from the file for each prompt, with the same results. max_tokens: the longest prompt to
    keep room for (a longer one makes layers leave). progress(stage, done, total) hears of loading; warn(line) hears why
    "auto" took the CPU (stderr unless given).

    Raises GGUFError (a bad file), ModelError (a model that is not supported), BackendError (no usable GPU, or not
    enough memory), InputError (a bad argument).
    """
    from .engine.model import load as load_model  # NumPy and the backends are only imported once a model is asked for

    return load_model(path, backend, device, kernels, progress, warn, vram, max_tokens)
