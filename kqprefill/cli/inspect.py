"""kqprefill inspect: what a model's file holds, read from its header alone."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError, KqprefillError
from .common import open_file, size, table

if TYPE_CHECKING:
    from ..gguf import ModelFile, ModelTensor

_GROUPS = [  # what a tensor's name begins with, after blk.N. -> group
    ("token_embd", "embedding"),
    ("output.", "output"),
    (r"ffn_\w+_exps", "experts"),
    ("attn_", "attention"),
    ("ffn_", "feed-forward"),
]
_ORDER = ("embedding", "attention", "feed-forward", "experts", "output", "norms and biases", "other")


@click.command()
@click.argument("name", metavar="MODEL|SHAPE:RECIPE")
@click.option("--tensors", is_flag=True, help="The table of tensors.")
@click.option(
    "--metadata", "key", is_flag=False, flag_value="", metavar="[KEY]", help="All metadata, or what is under KEY."
)
@click.option("--json", "as_json", is_flag=True, help="JSON, sizes in bytes.")
def inspect(name: str, tensors: bool, key: str | None, as_json: bool) -> None:
    """Say what a GGUF file holds.

    Architecture, sizes, quantisation by kind of tensor, and whether kqprefill runs it.

    Only the header is read, so it is instant on a file of any size.

    \b
    kqprefill inspect examples/tiny-qwen3.gguf
    """
    if tensors and key is not None:
        raise click.UsageError("--tensors and --metadata both say what to print; give one")
    with open_file(name) as file:
        if tensors:
            click.echo(_tensors(file, as_json))
        elif key is not None:
            click.echo(_metadata(file, key, as_json))
        else:
            described = _describe(file, name)
            click.echo(json.dumps(described, ensure_ascii=False) if as_json else _for_people(described))


def _tensors(file: ModelFile, as_json: bool) -> str:
    if as_json:
        rows = [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
        return json.dumps(rows)
    lines = [[t.name, t.type.name, " x ".join(map(str, t.shape)), size(t.nbytes)] for t in file.tensors.values()]
    return table(["tensor", "type", "shape", "size"], lines)


def _describe(file: ModelFile, name: str) -> dict[str, Any]:
    from ..models import read_model

    backends, problem = ["cpu", "cuda"], None
    try:
        read_model(file)
    except KqprefillError as error:
        backends, problem = [], str(error)
    get = file.metadata.get
    architecture = get("general.architecture")
    groups: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        group = groups.setdefault(_group_of(tensor), {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}})
        group["tensors"] += 1
        group["parameters"] += math.prod(tensor.shape)
        group["bytes"] += tensor.nbytes
        group["types"][tensor.type.name] = group["types"].get(tensor.type.name, 0) + 1
    for group in groups.values():
        group["bits_per_weight"] = 8 * group["bytes"] / group["parameters"]
    embedding = file.tensors.get("token_embd.weight")
    return {
        "model": name,
        "name": get("general.name"),
        "architecture": architecture,
        "backends": backends,
        "problem": problem,
        "parameters": sum(group["parameters"] for group in groups.values()),
        "bytes": sum(group["bytes"] for group in groups.values()),
        "layers": get(f"{architecture}.block_count"),
        "context": get(f"{architecture}.context_length"),
        "vocabulary": embedding.shape[0] if embedding is not None else None,
        "tokenizer": get("tokenizer.ggml.model"),
        "groups": {name: groups[name] for name in _ORDER if name in groups},
    }


def _group_of(tensor: ModelTensor) -> str:
    if len(tensor.shape) == 1:
        return "norms and biases"
    name = re.sub(r"^blk\.\d+\.", "", tensor.name)
    return next((group for pattern, group in _GROUPS if re.match(pattern, name)), "other")


def _for_people(d: dict[str, Any]) -> str:
    def shown(value: object) -> str:
        return "?" if value is None else str(value)

    bits = 8 * d["bytes"] / d["parameters"] if d["parameters"] else 0
    lines = [
        f"{d['model']}: {shown(d['name'])}",
        f"architecture {shown(d['architecture'])}, {d['parameters'] / 1e9:.2f} B parameters in {size(d['bytes'])}, "
        f"{bits:.2f} bits each",
        f"{shown(d['layers'])} layers, context {shown(d['context'])}, vocabulary {shown(d['vocabulary'])} "
        f"({shown(d['tokenizer'])})",
        f"kqprefill runs it ({', '.join(d['backends'])})"
        if d["backends"]
        else f"kqprefill does not run it: {d['problem']}",
        "",
    ]
    rows = [
        [
            name,
            str(group["tensors"]),
            ", ".join(f"{count} {kind}" for kind, count in sorted(group["types"].items())),
            size(group["bytes"]),
            f"{group['bits_per_weight']:.2f}",
        ]
        for name, group in d["groups"].items()
    ]
    return "\n".join(lines) + table(["tensors", "", "types", "size", "bits a weight"], rows)


def _metadata(file: ModelFile, key: str, as_json: bool) -> str:
    """All of it, arrays by their first elements; or the whole value under a key."""
    if key and key not in file.metadata:
        raise InputError(f"{file.path}: there is no metadata {key!r}")
    values = {name: _plain(file.metadata[name]) for name in ([key] if key else file.metadata)}
    if as_json:
        return json.dumps(values[key] if key else values, ensure_ascii=False)
    if key:
        value = values[key]
        return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return "\n".join(f"{name} = {_short(value)}" for name, value in values.items())


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(repr, value[:8]))}, …] ({len(value)})"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
