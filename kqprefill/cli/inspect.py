"""kqprefill inspect: what a model's file holds, read from its header alone."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

from ..errors import BackendError, InputError, KqprefillError
from ..terminal import json_value, print_json, print_text, shown
from .common import open_file, parameters, print_object, size, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..gguf import ModelFile, ModelTensor

_GROUPS = [  # what a tensor's name begins with, after blk.N. -> group
    ("token_embd", "embedding"),
    ("output.", "output"),
    (r"ffn_\w+_exps", "experts"),
    ("ssm_", "recurrence"),
    ("attn_", "attention"),
    ("ffn_", "feed-forward"),
]
_LEFT = "left in the file"  # what prefill does not use, such as heads that draft further tokens
_ORDER = (
    *("embedding", "attention", "recurrence", "feed-forward", "experts", "output", "norms and biases", "other"),
    _LEFT,
)


@click.command()
@click.argument("name", metavar="MODEL|SHAPE:RECIPE")
@click.option("--tensors", is_flag=True, help="The table of tensors.")
@click.option(
    "--metadata", "key", is_flag=False, flag_value="", metavar="[KEY]", help="All metadata, or what is under KEY."
)
@click.option("--json", "as_json", is_flag=True, help="JSON, sizes in bytes.")
def inspect(name: str, tensors: bool, key: str | None, as_json: bool) -> None:
    """Say what a GGUF file holds.

    What kind of model it is, or of file; its sizes, quantisation by kind of tensor, and whether kqprefill runs it.

    Only the header is read, so it is instant on a file of any size.

    \b
    kqprefill inspect examples/tiny-qwen3.gguf
    """
    if tensors and key is not None:
        raise click.UsageError("--tensors and --metadata both say what to print; give one")
    with open_file(name) as file:
        if tensors:
            _print_tensors(file, as_json)
        elif key is not None:
            _print_metadata(file, key, as_json)
        else:
            described = _describe(file, name)
            if as_json:
                print_object(described)
            else:
                print_text(_for_people(described))


def _print_tensors(file: ModelFile, as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
        print_json(rows)
        return
    lines = [[shown(t.name), t.type.name, " x ".join(map(str, t.shape)), size(t.nbytes)] for t in file.tensors.values()]
    print_text(table(["tensor", "type", "shape", "size"], lines))


def _describe(file: ModelFile, name: str) -> dict[str, Any]:
    from ..backends.cuda.weights.plan import refuse_unsupported
    from ..gguf.keys import key_or_none
    from ..models import FAMILIES, read_model
    from ..models.unsupported import describe_file

    backends, problem, note, family = [], None, None, None
    try:
        family = read_model(file)
        backends.append("cpu")
        refuse_unsupported(family)
        backends.append("cuda")
    except BackendError as error:
        note = str(error).removeprefix(shown(f"{file.path}: "))
    except KqprefillError as error:
        problem = str(error)
    metadata = file.metadata
    what = describe_file(metadata, file.tensors, FAMILIES)
    architecture = key_or_none(metadata, "general.architecture")
    groups: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        kind = _LEFT if family is not None and family.leaves(tensor.name) else _group_of(tensor)
        group = groups.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}})
        group["tensors"] += 1
        group["parameters"] += math.prod(tensor.shape)
        group["bytes"] += tensor.nbytes
        group["types"][tensor.type.name] = group["types"].get(tensor.type.name, 0) + 1
    for group in groups.values():
        group["bits_per_weight"] = 8 * group["bytes"] / group["parameters"]
    sizes = f"{architecture}.vision" if what.kind == "projector" else architecture
    return {
        "model": name,
        "name": key_or_none(metadata, "general.name"),
        "kind": what.kind,
        "what": what.words,
        "examples": what.examples.split(", ") if what.examples else [],
        "architecture": architecture,
        "backends": backends,
        "problem": problem,
        "note": note,
        "parameters": sum(group["parameters"] for group in groups.values()),
        "bytes": sum(group["bytes"] for group in groups.values()),
        "layers": family.config.block_count if family else _size_in(metadata, f"{sizes}.block_count"),
        "context": _size_in(metadata, f"{architecture}.context_length"),
        "vocabulary": _vocabulary(file, architecture),
        "tokenizer": key_or_none(metadata, "tokenizer.ggml.model"),
        "groups": {name: groups[name] for name in _ORDER if name in groups},
        "left": [name for name in file.tensors if family is not None and family.leaves(name)],
    }


def _size_in(metadata: Mapping[str, Any], key: str) -> int | None:
    """A number that the file gives, or None for anything else that stands there; `problem` says what that is."""
    from ..gguf.keys import COUNT

    value: int | None = COUNT.accept(metadata.get(key))
    return value


def _vocabulary(file: ModelFile, architecture: str | None) -> int | None:
    """How many tokens the file knows: by its embedding, its metadata, or its tokenizer."""
    from ..gguf.keys import key_or_none

    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    count = _size_in(file.metadata, f"{architecture}.vocab_size")
    tokens = key_or_none(file.metadata, "tokenizer.ggml.tokens") if count is None else None
    return count if tokens is None else len(tokens)


def _group_of(tensor: ModelTensor) -> str:
    if len(tensor.shape) == 1:
        return "norms and biases"
    name = re.sub(r"^blk\.\d+\.", "", tensor.name)
    return next((group for pattern, group in _GROUPS if re.match(pattern, name)), "other")


def _for_people(d: dict[str, Any]) -> str:
    def known(value: object) -> str:
        """In one line, whatever the file has there."""
        return "?" if value is None else shown(value)

    bits = 8 * d["bytes"] / d["parameters"] if d["parameters"] else 0
    examples = f" such as {', '.join(d['examples'])}" if d["examples"] else ""
    lines = [
        f"{known(d['model'])}: {known(d['name'])}",
        f"{shown(d['what'])}{examples}",
        f"architecture {known(d['architecture'])}, {parameters(d['parameters'])} parameters in {size(d['bytes'])}, "
        f"{bits:.2f} bits each",
    ]
    if any(d[key] is not None for key in ("layers", "context", "vocabulary", "tokenizer")):
        lines.append(
            f"{known(d['layers'])} layers, context {known(d['context'])}, vocabulary {known(d['vocabulary'])} "
            f"({known(d['tokenizer'])})"
        )
    if d["backends"]:
        lines.append(f"kqprefill runs it ({', '.join(d['backends'])})" + (f"; {d['note']}" if d["note"] else ""))
    else:
        lines.append(f"kqprefill does not run it: {d['problem']}")
    if not d["groups"]:
        return "\n".join(lines)
    lines.append("")
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
    left = "".join(f"\n{_LEFT}: {part}" for part in _left_parts(d["left"]))
    return "\n".join(lines) + "\n" + table(["tensors", "n", "types", "size", "bits a weight"], rows) + left


def _left_parts(names: list[str]) -> Iterator[str]:
    """What of a file prefill does not use, part by part, given the tensors' names."""
    from ..models.family import TOWERS

    for prefix in TOWERS:
        if count := sum(name.startswith(prefix) for name in names):
            yield f"{prefix}* ({count} tensor{'s' * (count > 1)}), which see or hear"
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, own = name.removeprefix("blk.").partition(".")
        if name.startswith("blk."):
            blocks.setdefault(shown(f"blk.{block}"), []).append(shown(own.removesuffix(".weight")))
    alike: dict[tuple[str, ...], list[str]] = {}
    for block, own_names in blocks.items():
        alike.setdefault(tuple(sorted(own_names)), []).append(block)
    for tensors, of in alike.items():
        if any(name.startswith("nextn.") for name in tensors):
            yield f"{', '.join(of)} ({len(tensors)} tensors{' each' * (len(of) > 1)}), which draft further tokens"
        else:
            yield f"{', '.join(tensors)} of {', '.join(of)}"


def _print_metadata(file: ModelFile, key: str, as_json: bool) -> None:
    """All of it, arrays by their first elements; or the whole value under a key."""
    if key and key not in file.metadata:
        raise InputError(f"{file.path}: there is no metadata {key!r}")
    values = {name: _plain(file.metadata[name]) for name in ([key] if key else file.metadata)}
    if as_json:
        print_json(json_value(values[key] if key else values))
    elif key:
        value = values[key]
        print_text("\n".join(map(str, value)) if isinstance(value, list) else value)
    else:
        print_text("\n".join(f"{shown(name)} = {_short(value)}" for name, value in values.items()))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: object) -> str:
    """A value in one line, as Python spells it, which escapes what a terminal would obey."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(_short(element) for element in value[:8])}, …] ({len(value)})"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
