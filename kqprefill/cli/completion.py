"""kqprefill completion: for the shell."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context, shell):
    """Print a shell's completion script.

    For the file that the shell reads at its start.

    \b
    kqprefill completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)(context.find_root().command, {}, "kqprefill", "_KQPREFILL_COMPLETE")
    click.echo(made.source())
