"""kqprefill cache: the compiled kernels on disk."""

from __future__ import annotations

import sys

import click

from ..errors import KqprefillError
from ..terminal import print_text
from .common import print_object, size


@click.command()
@click.option("--clear", is_flag=True, help="Remove them; they are compiled again when needed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, sizes in bytes.")
def cache(clear: bool, as_json: bool) -> None:
    """Show or clear the compiled kernels on disk.

    They lie in $KQPREFILL_CACHE_DIR, or kqprefill in the user's cache folder. (A path that is not absolute is ignored.)
    Only what kqprefill wrote there is shown, and removed.

    \b
    kqprefill cache
    """
    from ..backends.cuda.device.compiler import KernelCache, ignored_variables

    for line in ignored_variables():
        print_text(f"kqprefill: {line}", sys.stderr)
    kernels = KernelCache()
    if kernels.folder is None:
        raise KqprefillError(kernels.why_off())
    count, nbytes = kernels.clear() if clear else kernels.held()
    if as_json:
        print_object({"folder": str(kernels.folder), "kernels": count, "bytes": nbytes, "cleared": clear})
    else:
        print_text(f"{kernels.folder}: {count} programs, {size(nbytes)}" + (" removed" if clear else ""))
