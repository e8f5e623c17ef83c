"""What `kqprefill imatrix` tells of a matrix: statistics, and experts that no token went to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..terminal import json_value
from .common import print_object, say, table

if TYPE_CHECKING:
    from ..engine.imatrix_file import ImportanceMatrix, Statistics


def say_gaps(matrix: ImportanceMatrix) -> None:
    """Which experts no token went to, of which llama-quantize knows nothing."""
    gaps = {n: int((e.counts == 0).sum()) for n, e in matrix.entries.items() if "_down_exps" in n}
    unreached = sum(gaps.values())
    if unreached:
        most = max(gaps, key=lambda n: gaps[n])
        say(
            f"no token went to {unreached} of {sum(len(matrix.entries[n].counts) for n in gaps)} experts, to "
            f"{gaps[most]} of {most}'s; a longer text reaches more"
        )


def report(
    matrix: ImportanceMatrix, name: str | None, precision: str | None, show_statistics: bool, as_json: bool
) -> None:
    """Print the statistics, or one object of docs/json.md, where asked to. name, precision: the model's, if there is
    one."""
    from ..engine.imatrix_file import means_by_layer, statistics

    if not (show_statistics or as_json):
        return
    stats = statistics(matrix) if show_statistics else []
    layers = means_by_layer(stats)
    if as_json:
        described: dict[str, Any] = {
            "model": name,
            "precision": precision,
            "chunks": matrix.chunks,
            "context": matrix.chunk_size,
            "datasets": list(matrix.datasets),
            "tensors": len(matrix.entries),
        }
        if show_statistics:
            described["statistics"] = [{**asdict(own), "normalised_entropy": own.normalised_entropy} for own in stats]
            described["layers"] = [
                {"layer": layer, "total": total, "above": above, "cosine": cosine}
                for layer, (total, above, cosine) in layers.items()
            ]
        print_object(json_value(described))
        return
    click.echo(table(_HEAD, [_line(own) for own in stats]))
    if layers:
        click.echo()
        rows = [
            [str(n), f"{total:.2f}", f"{above:.2%}", f"{cosine:.4f}"] for n, (total, above, cosine) in layers.items()
        ]
        click.echo(table(["layer", "mean total", "mean ZD", "mean cosine"], rows))


_HEAD = "tensor total min max mean deviation active columns entropy normalised ZD cosine".split()


def _line(own: Statistics) -> list[str]:
    return [
        own.tensor,
        f"{own.total:.2f}",
        f"{own.smallest:.4f}",
        f"{own.largest:.4f}",
        f"{own.mean:.2f}",
        f"{own.deviation:.2f}",
        f"{own.active:.2%}",
        str(own.columns),
        f"{own.entropy:.4f}",
        f"{own.normalised_entropy:.2%}",
        f"{own.above:.2%}",
        "" if own.cosine is None else f"{own.cosine:.4f}",
    ]
