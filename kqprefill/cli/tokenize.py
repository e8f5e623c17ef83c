"""kqprefill tokenize: text to token ids."""

from __future__ import annotations

import click

from ..terminal import print_json
from .common import read_text, read_text_file
from .outputs import STDIO
from .sources import model_path


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path())
@click.argument("text", required=False)
@click.option("-f", "--file", "path_of_text", metavar="FILE", help="The text is in FILE, as with @FILE.")
@click.option("--no-special", is_flag=True, help="Without the BOS and EOS that the file asks for.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array of {id, text}.")
def tokenize(path: str, text: str | None, path_of_text: str | None, no_special: bool, as_json: bool) -> None:
    """Print a text's token ids.

    By the tokenizer in the model's file, as --tokens takes them.

    TEXT is the text itself, `@FILE`, or `-` for stdin, which is read where there is none.

    \b
    kqprefill tokenize examples/tiny-qwen3.gguf Hello
    """
    from ..gguf import GGUFFile
    from ..gguf.vocabulary import token_text
    from ..text import Tokenizer

    if text is not None and path_of_text is not None:
        raise click.UsageError("TEXT and --file both are the text; give one")
    if path_of_text is not None:
        words = read_text_file(path_of_text, "--file")
    else:
        words = read_text(STDIO if text is None else text, "TEXT")
    with GGUFFile(model_path(path)) as file:
        ids = Tokenizer(file.metadata, path).encode(words, add_special=not no_special)
        if as_json:
            described = [{"id": token, "text": token_text(file.metadata, token)} for token in ids]
            print_json(described)
        else:
            click.echo(",".join(map(str, ids)))
