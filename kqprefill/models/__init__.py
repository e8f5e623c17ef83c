"""Model families, one a page, and the registry that finds the page for a file's general.architecture."""

from ..errors import ModelError
from .gemma3 import Gemma3
from .llama import Llama
from .qwen2 import Qwen2
from .qwen3 import Qwen3

FAMILIES = {family.architecture: family for family in (Qwen3, Llama, Qwen2, Gemma3)}


def read_model(file):
    """The family of an open GGUFFile, over its tensors. Raises ModelError for one that is not supported."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{file.path}: metadata general.architecture is missing; this is no language model")
    if architecture not in FAMILIES:
        raise ModelError(
            f"{file.path}: architecture {architecture!r} is not supported; these are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture](file)
