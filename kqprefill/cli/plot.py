"""Figures as pictures: those of bench and of kld."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError

if TYPE_CHECKING:
    from ..engine.divergence import Divergence


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


def draw_divergence(found: Divergence, title: str, file: BinaryIO, kind: str) -> None:
    """How the divergences of places are spread, and the changes of the probability of the tokens that came."""
    from matplotlib.figure import Figure
    import numpy as np

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    spread, changed = figure.subplots(1, 2)
    ordered = np.sort(found.klds)[::-1]
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    above = ordered > 0  # rounding leaves some of equal distributions at or below nothing
    if above.any():
        spread.plot(ordered[above], 100 * shares[above], color="C0")
        spread.set_xscale("log")
        spread.set_yscale("log")
    spread.axvline(found.kld.value, color="0.45", linestyle="--", label=f"mean {found.kld.value:.3g}")
    spread.axvline(found.kld_at[0.5], color="0.45", linestyle=":", label=f"median {found.kld_at[0.5]:.3g}")
    spread.set_xlabel("KL divergence, nats")
    spread.set_ylabel("tokens with more, %")
    spread.legend(fontsize=8, frameon=False, loc="lower left")
    changed.hist(100 * found.changes, bins=81, color="C0", log=True)
    changed.set_xlabel("change of the probability of the token that came, points of %")
    changed.set_ylabel("tokens")
    for axes in (spread, changed):
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # which would begin a formula
    figure.savefig(file, format=kind)
