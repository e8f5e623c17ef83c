"""ggml's types and block sizes: the `gguf` package's constants, without the rest of the package.

Importing all of it takes as long as opening a model does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.constants import GGMLQuantizationType as GGML
else:

    def _constants() -> ModuleType:
        if "gguf.constants" in sys.modules:
            return sys.modules["gguf.constants"]
        folder = importlib.util.find_spec("gguf").submodule_search_locations[0]  # finds the package, runs nothing of it
        spec = importlib.util.spec_from_file_location("kqprefill.gguf._constants", os.path.join(folder, "constants.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    _module = _constants()
    GGML = _module.GGMLQuantizationType  # an IntEnum: its members equal those of gguf.constants
    GGML_QUANT_SIZES = _module.GGML_QUANT_SIZES  # type -> (elements, bytes) of a block

__all__ = ["GGML", "GGML_QUANT_SIZES"]
