"""kqprefill completion: for the shell."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    For the file that the shell reads at its start.

    \b
    kqprefill completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    completion_of = get_completion_class(shell)
    assert completion_of is not None, "click completes in each shell that the argument allows"
    click.echo(completion_of(context.find_root().command, {}, "kqprefill", "_KQPREFILL_COMPLETE").source())
