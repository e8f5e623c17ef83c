"""kqprefill bench's figures as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from ..errors import InputError


def check_plot(path: str) -> str:
    """The kind of picture that path's ending says, such as "png". Raises InputError where none can be drawn."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'kqprefill[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    kind: str = path.rpartition(".")[2].lower()
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"--plot {path}: a picture's name ends in .png, .svg or .pdf")
    return kind


def draw(
    rows: Sequence[dict[str, Any]],
    floors: Sequence[tuple[str, Callable[[int], float]]],
    file: BinaryIO,
    kind: str,
) -> None:
    """Tokens/s against prompt length, with what floors (kqprefill.backends.cuda.bounds) allow, into a binary file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lengths = [row["prompt_tokens"] for row in rows]
    low, high = min(lengths) / 1.5, max(lengths) * 1.5
    steps = [low * (high / low) ** (i / 100) for i in range(101)]
    for (what, seconds), style in zip(floors, ("--", ":")):
        axes.plot(steps, [n / seconds(n) for n in steps], style, color="0.45", linewidth=1.3, label=f"bound by {what}")
    rates, spread = [row["tokens_per_second"] for row in rows], [row["tokens_per_second_stddev"] for row in rows]
    axes.errorbar(
        lengths, rates, spread, marker="o", color="C0", capsize=3, label="measured (mean and standard deviation)"
    )
    for n, rate in zip(lengths, rates):
        axes.annotate(
            f"{rate:.0f}", (n, rate), textcoords="offset points", xytext=(0, -16), ha="center", fontsize=8, color="C0"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    allowed = [min(n / seconds(n) for _, seconds in floors) for n in steps] if floors else rates
    axes.set_ylim(min(rates) / 2, 3 * max(*rates, *allowed))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{rows[0]['model']}, {rows[0]['device']}", fontsize=10)
    axes.grid(True, which="major", color="0.9")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(file, format=kind)
