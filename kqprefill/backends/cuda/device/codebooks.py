"""The grids of ggml's i-quants as text for kernels/quants/codebooks.cuh, from the `gguf` package's tables."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

# The macro that each type's struct needs, and the type whose grid it is.
_MACROS = {
    "IQ2_XXS": ("GRID_IQ2_XXS", "IQ2_XXS"),
    "IQ2_XS": ("GRID_IQ2_XS", "IQ2_XS"),
    "IQ2_S": ("GRID_IQ2_S", "IQ2_S"),
    "IQ3_XXS": ("GRID_IQ3_XXS", "IQ3_XXS"),
    "IQ3_S": ("GRID_IQ3_S", "IQ3_S"),
    "IQ1_S": ("GRID_IQ1", "IQ1_S"),
    "IQ1_M": ("GRID_IQ1", "IQ1_S"),
}


def definitions(type_names: Iterable[str]) -> str:
    """Text that defines the grids of those of these ggml types that have one."""
    wanted = dict.fromkeys(_MACROS[name] for name in type_names if name in _MACROS)
    return "".join(f"#define {macro} {_grid(name)}\n" for macro, name in wanted)


@cache
def _grid(name: str) -> str:
    """A grid's entries, their bytes 4 to a word, each word's middle two exchanged (quants/common.cuh: paired)."""
    from gguf import quants  # late: most models need no grid

    kind = getattr(quants, name)
    kind.init_grid()
    values = np.asarray(kind.grid).reshape(kind.grid_shape)
    if name == "IQ1_S":  # in eighths, and positive with the smaller of ggml's two steps added
        values = 8 * values + 15
    words = np.ascontiguousarray(values.astype(np.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]]).view("<u4")[:, 0]
    entries = words.reshape(len(values), -1)
    return ",".join(
        "{" + ",".join(f"{word}u" for word in entry) + "}" if len(entry) > 1 else f"{entry[0]}u" for entry in entries
    )
