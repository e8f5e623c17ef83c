"""kqprefill tokenize: text to token ids."""

from __future__ import annotations

import json

import click

from .common import read_text


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path())
@click.argument("text", default="-")
@click.option("--no-special", is_flag=True, help="Without the BOS and EOS that the file asks for.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array of {id, text}.")
def tokenize(path: str, text: str, no_special: bool, as_json: bool) -> None:
    """Print a text's token ids.

    By the tokenizer in the model's file, as --tokens takes them.

    TEXT is the text itself, `@FILE` or `-` for stdin.

    \b
    kqprefill tokenize examples/tiny-qwen3.gguf Hello
    """
    from ..gguf import GGUFFile
    from ..gguf.vocabulary import token_text
    from ..text import Tokenizer

    words = read_text(text, "TEXT")
    with GGUFFile(path) as file:
        ids = Tokenizer(file.metadata, path).encode(words, add_special=not no_special)
        if as_json:
            described = [{"id": token, "text": token_text(file.metadata, token)} for token in ids]
            click.echo(json.dumps(described, ensure_ascii=False))
        else:
            click.echo(",".join(map(str, ids)))
