"""kqprefill: prefill of GGUF language models at the rate of the GPU's matrix units.

with kqprefill.load("model.gguf") as model:
    result = model.prefill([1, 2, 3], logits="last")
    print(result.token, result.logit)
"""

from .errors import BackendError, GGUFError, InputError, KqprefillError, ModelError

__version__ = "0.1.0"
__all__ = ["load", "KqprefillError", "GGUFError", "ModelError", "InputError", "BackendError", "__version__"]


def load(path, **options):
    """Open a GGUF model and make it ready to prefill; `kqprefill.engine.model.load` says which options there are."""
    from .engine.model import load  # NumPy and the backends are only imported once a model is asked for

    return load(path, **options)
