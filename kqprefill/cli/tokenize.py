"""kqprefill tokenize: text to token ids, and back."""

from __future__ import annotations

import click

from ..terminal import print_json, print_text
from .common import read_text, read_text_file, read_tokens, special_option
from .outputs import STDIO
from .sources import model_path


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path())
@click.argument("texts", metavar="[TEXT]", nargs=-1)
@click.option("-f", "--file", "path_of_text", metavar="FILE", help="The text is in FILE, as with @FILE.")
@click.option("--decode", is_flag=True, help="Print the text of ids: `1,2,3`, `1 2 3`, `@FILE`, or `-` for stdin.")
@special_option
@click.option(
    "--no-bos",
    is_flag=True,
    help="Without the BOS and EOS that the file asks for; with --decode, one that is there is text.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON array of {id, text}.")
def tokenize(
    path: str,
    texts: tuple[str, ...],
    path_of_text: str | None,
    decode: bool,
    no_special: bool,
    no_bos: bool,
    as_json: bool,
) -> None:
    """Print a text's token ids.

    By the tokenizer in the model's file, as --tokens of other commands takes them; with --decode, the text of ids.

    TEXT is the text itself, `@FILE`, or `-` for stdin, which is read where there is none.

    \b
    kqprefill tokenize examples/tiny-qwen3.gguf Hello
    kqprefill tokenize examples/tiny-qwen3.gguf --decode 72,101,108,108,111
    """
    from ..gguf import GGUFFile
    from ..gguf.vocabulary import token_text
    from ..text import Tokenizer

    if texts and path_of_text is not None:
        raise click.UsageError("TEXT and --file both are the text; give one")
    if decode and no_special:
        raise click.UsageError("--no-special says how a text is read; --decode reads none")
    if len(texts) > 1 and not decode:
        raise click.UsageError("TEXT is one argument; quote it")
    text, ids = " ".join(texts) if texts else STDIO, []
    if decode:
        ids = read_tokens(text if path_of_text is None else f"@{path_of_text}", "IDS")
    elif path_of_text is not None:
        text = read_text_file(path_of_text, "--file", may_be_empty=True)
    else:
        text = read_text(text, "TEXT", may_be_empty=True)
    with GGUFFile(model_path(path)) as file:
        tokenizer = Tokenizer(file.metadata, path)
        if decode:
            decoded = tokenizer.decode(ids, add_special=not no_bos)
        else:
            ids = tokenizer.encode(text, add_special=not no_bos, parse_special=not no_special)
        if as_json:
            print_json([{"id": token, "text": token_text(file.metadata, token)} for token in ids])
        elif decode:
            print_text(decoded.decode("utf-8", "surrogateescape"))  # bytes that are no text stay bytes in a pipe
        else:
            click.echo(",".join(map(str, ids)))
