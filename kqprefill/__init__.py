"""kqprefill: prefill of GGUF language models at the rate of the GPU's matrix units.

with kqprefill.load("model.gguf") as model:
    result = model.prefill([1, 2, 3], logits="last")
    print(result.token, result.logit)

help(kqprefill.load) and help(kqprefill.Model) say what there is. The logger "kqprefill" says what is loaded and where
(INFO), how fast prompts run (DEBUG), and why a GPU could not be used (WARNING).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
from typing import TYPE_CHECKING

from .errors import BackendError, GGUFError, InputError, KqprefillError, ModelError, StateError

if TYPE_CHECKING:
    from .backends.base import Cache
    from .backends.budget import Budget
    from .core import Progress
    from .engine.model import Model
    from .engine.perplexity import Perplexity, perplexity
    from .engine.prefill import Prefill
    from .engine.scoring import Item, Scored
    from .timeline import Stage

__version__ = "0.2.0"
__all__ = [
    "BackendError",
    "Cache",
    "GGUFError",
    "InputError",
    "Item",
    "KqprefillError",
    "Model",
    "ModelError",
    "Perplexity",
    "Prefill",
    "Scored",
    "Stage",
    "StateError",
    "__version__",
    "load",
    "perplexity",
]

# What is imported once it is asked for, since NumPy comes with it: name -> module.
_LATER = {
    "Cache": "backends.base",
    "Item": "engine.scoring",
    "Model": "engine.model",
    "Perplexity": "engine.perplexity",
    "Prefill": "engine.prefill",
    "Scored": "engine.scoring",
    "Stage": "timeline",
    "perplexity": "engine.perplexity",
}


def __getattr__(name: str) -> object:
    """The types of what `load` gives, and `perplexity`."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | int | Sequence[int] = 0,
    kernels: str = "auto",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    vram: Budget | str | int | None = None,
    max_tokens: int | None = None,
    precision: str = "exact",
) -> Model:
    """Open a GGUF model and make it ready to prefill: a Model, a context manager.

    path: the file; of a split model the first.
    backend: "auto" (CUDA where usable, else the CPU, said in one line), "cuda" or "cpu".
    device: the CUDA device's number; or several ([0, 1], "0,1", "all"), over which the layers are split.
    kernels: "auto", or "portable" for the kernels of every GPU on one that has its own.
    progress: progress(stage, done, total) hears of loading.
    warn: warn(line) hears why "auto" took the CPU; unless given, the logger "kqprefill" where anybody listens to it,
        else stderr.
    vram: the GPU memory that may be taken of each device, all told: bytes, "8G" or "75%"; None for all that is free.
        Layers that have no room in it are streamed from the file for each prompt, with the same results.
    max_tokens: the longest prompt to keep room for (a longer one makes layers leave). Where layers are streamed,
        `Model.score` makes room for the batches that hide their copies by itself.
    precision: "exact", or "int8": layers' large quantised matrices and what they are multiplied by are rounded to 8
        bits (kqprefill.models.precision), which changes results a little: `kqprefill kld --precision int8` says how
        much.

    Raises GGUFError (a bad file), ModelError (a model that is not supported), BackendError (no usable GPU, or not
    enough memory), InputError (a bad argument).
    """
    from .engine.model import load as load_model  # NumPy and the backends are only imported once a model is asked for

    return load_model(path, backend, device, kernels, progress, warn, vram, max_tokens, precision)
