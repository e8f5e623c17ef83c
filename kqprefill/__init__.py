"""kqprefill: prefill of GGUF language models at the rate of the GPU's matrix units.

with kqprefill.load("model.gguf") as model:
    result = model.prefill([1, 2, 3], logits="last")
    print(result.token, result.logit)
"""

from .errors import BackendError, GGUFError, InputError, KqprefillError, ModelError

__version__ = "0.1.0"
__all__ = ["load", "KqprefillError", "GGUFError", "ModelError", "InputError", "BackendError", "__version__"]


def load(path, backend="auto", device=0, kernels="auto", progress=None, warn=None):
    """Open a GGUF model and make it ready to prefill; see `kqprefill.engine.model.load`."""
    from .engine.model import load  # NumPy and the backends are only imported once a model is asked for

    return load(path, backend=backend, device=device, kernels=kernels, progress=progress, warn=warn)
