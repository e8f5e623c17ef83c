"""Print docs/models.md: which architectures run, where, and what the others are.

usage: python tests/bench/models_page.py >docs/models.md

All of it comes from the package, tests/data and the sizes below; tests/test_models_page.py holds the page to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import math
from pathlib import Path
import re
import sys

from kqprefill.gguf import GGUFFile
from kqprefill.models import FAMILIES
from kqprefill.models.family import Family
from kqprefill.models.unsupported import FILES, KIND_OF, KINDS, LACKING
from kqprefill.synthetic import SyntheticFile

ROOT = Path(__file__).resolve().parents[2]
# The largest model of each architecture that one of these pages of docs has figures of, by its shape's name.
MEASURED = {
    "performance.md": "qwen3-32b qwen3-30b-a3b gpt-oss-20b llama3-70b gemma3-270m".split(),
    "performance-models.md": (
        "qwen3.6-27b qwen3.6-35b-a3b glm-4.5-air deepseek-v2-lite gemma4-31b nemotron-nano-9b-v2 lfm2-8b-a1b"
    ).split(),
}
_ON_A_CPU = ["gemma3-270m"]

_HEAD = """# Models

A file's `general.architecture` says which layers its model has. `kqprefill inspect model.gguf` names it, of any GGUF,
and says whether it runs. This page is printed by `python tests/bench/models_page.py`, from the package itself.

## What runs
{count} architectures, with some models of each; others of the same architecture run, too. Of models that see or hear,
the part that reads text runs. A case is a small model in `tests/data/` whose logits are held to llama.cpp's. The last
column is the largest size that a page has figures of: on an H100 with random weights of that shape, or on a CPU where
it says so. All run on both backends, CUDA and CPU."""


def special(family: type[Family]) -> str:
    """What its class says of it, or the page that is its own: the first paragraph, papers as links."""
    text = vars(family).get("__doc__") or sys.modules[family.__module__].__doc__ or ""
    line = " ".join(text.split("\n\n")[0].split())
    return re.sub(r"\b\d{4}\.\d{5}\b", lambda paper: f"[{paper[0]}](https://arxiv.org/abs/{paper[0]})", line)


def cases() -> dict[str, list[str]]:
    """The released conformance cases of each architecture, the names of those that have one."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests" / "data").glob("*.gguf")):
        with GGUFFile(path) as file:
            found.setdefault(file.metadata["general.architecture"], []).append(path.stem)
    return found


def case(names: Sequence[str]) -> str:
    """Those of one architecture, for a table's cell."""
    if not names:
        return "beside a development tree"
    first = min(names, key=lambda name: ("q4_k" not in name, name))
    return f"`{first}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def measured() -> dict[str, str]:
    """The largest size measured of each architecture that has one, for a table's cell."""
    cells = {}
    for page, names in MEASURED.items():
        for name in names:
            file = SyntheticFile.named(f"{name}:Q4_K_M")
            count = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
            where = ", on a CPU" if name in _ON_A_CPU else ""
            cells[file.metadata["general.architecture"]] = f"[{name}]({page}): {count / 1e9:.3g} B{where}"
    return cells


def table(head: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown; head: the columns' titles, parted by bars."""
    yield f"| {head} |"
    yield f"|{' --- |' * (head.count('|') + 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def page() -> Iterator[str]:
    """The page's lines."""
    have, sizes = cases(), measured()
    yield from _HEAD.format(count=len(FAMILIES)).splitlines()
    yield ""
    rows = [
        [f"`{name}`", f.examples, special(f), case(have.get(name, [])), sizes.get(name, "-")]
        for name, f in sorted(FAMILIES.items())
    ]
    yield from table("architecture | models | what is special | case | largest measured", rows)
    yield "## Language models that do not run yet"
    yield "What they need is in what their layers differ from those that run; `-` where no difference is known."
    yield ""
    rows = [
        [f"`{name}`", lacking.models, lacking.needs or "-", ", ".join(f"`{n}`" for n in lacking.nearest.split()) or "-"]
        for name, lacking in sorted(LACKING.items())
    ]
    yield from table("architecture | models | needs | nearest that runs", rows)
    yield "## Other files"
    yield "Not what kqprefill is for: `inspect` says what they are."
    yield ""
    rows = [
        [words, ", ".join(f"`{name}`" for name, its in KIND_OF.items() if its == kind), advice]
        for kind, (words, advice) in KINDS.items()
        if kind in KIND_OF.values()
    ]
    rows += [[words, "-", advice] for words, advice in FILES.values()]
    yield from list(table("what | architectures | why not, or what to do", rows))[:-1]


if __name__ == "__main__":
    print("\n".join(page()))
