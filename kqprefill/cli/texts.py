"""A long text that is cut into windows, as `perplexity` and `kld` take it: options, ids, and how far a run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..errors import KqprefillError
from .common import Command, has_piped_stdin, read_text_file, read_tokens
from .outputs import STDIO, Outputs


def text_options(command: Command) -> Command:
    """--file, --tokens, --context, --chunks."""
    command = click.option(
        "--chunks", default=None, metavar="N", type=click.IntRange(1), help="Windows at most.  [default: all]"
    )(command)
    command = click.option(
        "-c",
        "--context",
        default=512,
        show_default=True,
        metavar="T",
        envvar="KQPREFILL_CONTEXT",
        show_envvar=True,
        help="Tokens of a window.",
    )(command)
    command = click.option("--tokens", metavar="IDS", help="Token ids instead: `1,2,3`, `-` for stdin, `@FILE`.")(
        command
    )
    return click.option(
        "-f",
        "--file",
        "text",
        metavar="FILE",
        help="The text, for the model's own tokenizer; `-` is stdin, which is read where it is piped and nothing is "
        "named.",
    )(command)


class LongText:
    """What --file or --tokens give. Raises click's UsageError where not just one is given, and as the readers do."""

    def __init__(self, text: str | None, tokens: str | None, no_special: bool, outputs: Outputs) -> None:
        if text is None and tokens is None and has_piped_stdin():
            text = STDIO
        if (text is None) == (tokens is None):
            raise click.UsageError("give the text either as --file FILE or as --tokens IDS")
        if tokens is not None and no_special:
            raise click.UsageError("--no-special is for a text; --tokens are ids already")
        outputs.reads_text(tokens, "--tokens")
        if text is not None:
            outputs.reads(text, "the file of --file")
        self._parse_special = not no_special
        self._ids = None if tokens is None else read_tokens(tokens)
        self._words = None if text is None else read_text_file(text, "--file")

    def ids(self, metadata: Mapping[str, Any], name: str) -> tuple[list[int], int | None]:
        """Its token ids, and the BOS (`ids_and_bos`)."""
        return ids_and_bos(self._words, self._ids, self._parse_special, metadata, name)


def ids_and_bos(
    words: str | None, ids: list[int] | None, parse_special: bool, metadata: Mapping[str, Any], name: str
) -> tuple[list[int], int | None]:
    """A text's token ids by the tokenizer of a file called `name`, or the ids that are given in its place; and the BOS
    that the file asks for (`bos_of`). Raises as `Tokenizer` does where a text is given."""
    from ..text import Tokenizer

    if words is not None:
        tokenizer = Tokenizer(metadata, name)
        return tokenizer.encode(words, parse_special=parse_special), tokenizer.bos
    assert ids is not None, "the text is given as --file or as --tokens"
    return ids, bos_of(metadata, name)


def bos_of(metadata: Mapping[str, Any], name: str) -> int | None:
    """The BOS that a file asks for, None where it asks for none or has no tokenizer."""
    from ..text import Tokenizer

    try:
        return Tokenizer(metadata, name).bos
    except KqprefillError:
        return None
