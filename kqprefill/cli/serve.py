"""kqprefill serve: log-probabilities, vectors and relevances over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
import os
import signal
import traceback
from types import FrameType

import click

from ..errors import InputError
from .common import (
    batch_option,
    open_file,
    read_text,
    say,
    say_loaded,
)
from .interrupts import on_signals, raise_signal
from .progress import progress_bars
from .run_options import RunOptions, run_options

_LOCAL = "127.0.0.1", "::1", "localhost"


@click.command()
@click.argument("name", metavar="MODEL", type=click.Path())
@click.option("--host", default=_LOCAL[0], show_default=True, help="The address to listen at; only this machine's own.")
@click.option("--port", default=8080, show_default=True, metavar="N", type=click.IntRange(0, 65535), help="0: any.")
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="KQPREFILL_API_KEY",
    show_envvar=True,
    help="Requests must carry it as `Authorization: Bearer KEY`; `@FILE` reads a file.",
)
@click.option("--alias", metavar="NAME", help="The model's name for clients.  [default: the file's]")
@click.option("--pooling", type=click.Choice(["last", "mean", "cls"]), help="Of vectors.  [default: the file's]")
@click.option(
    "--tokenize-bos",
    is_flag=True,
    help="/tokenize begins with the BOS that the file asks for, whatever a client says: lm-evaluation-harness never "
    "asks for it.",
)
@click.option(
    "--drain",
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(0),
    help="After SIGTERM: how long clients may take for their answers, once all are computed.",
)
@click.option(
    "--max-logprobs",
    default=20,
    show_default=True,
    metavar="K",
    type=click.IntRange(1, 256),
    help="Likeliest tokens that a request may ask for at each place.",
)
@click.option(
    "--max-body",
    default=32,
    show_default=True,
    metavar="MIB",
    type=click.IntRange(1),
    help="MiB of a request's body; more is a 413.",
)
@click.option(
    "--max-request-tokens",
    default=1_000_000,
    show_default=True,
    metavar="T",
    type=click.IntRange(1),
    help="Tokens of a request's prompts; more is a 413.",
)
@click.option(
    "--max-queue-tokens",
    default=2_000_000,
    show_default=True,
    metavar="T",
    type=click.IntRange(1),
    help="Tokens that wait, all told; a request that has no room is a 429.",
)
@batch_option
@run_options
def serve(
    name: str,
    host: str,
    port: int,
    api_key: str | None,
    alias: str | None,
    pooling: str | None,
    tokenize_bos: bool,
    drain: float,
    max_logprobs: int,
    max_body: int,
    max_request_tokens: int,
    max_queue_tokens: int,
    batch_tokens: int | None,
    on: RunOptions,
) -> None:
    """Answer requests over HTTP, in OpenAI's shapes.

    /v1/completions gives log-probabilities of prompts (`echo`, `logprobs`; `max_tokens` 0 or 1), /v1/embeddings
    vectors, /v1/rerank relevances; /tokenize, /tokenizer_info, /v1/models, /health and /metrics are there for tools.
    What waits is packed into the next batch. SIGTERM, or Ctrl-C, ends it once what waits is answered, and the answers
    are read (--drain); a second one at once.

    \b
    kqprefill serve examples/tiny-qwen3.gguf --port 8080
    """
    try:
        from ..serve.app import App, Gate
        from ..serve.server import Serving, address_of, bind
    except ImportError as error:
        raise InputError(f"serve needs {error.name}: pip install 'kqprefill[serve]'") from None
    from ..serve.openai import Server
    from ..serve.queue import Engine

    key = None if api_key is None else read_text(api_key, "--api-key").strip()
    if key == "":
        raise InputError("--api-key: the key is empty")
    on.wake()
    with ExitStack() as stack:
        listening = stack.enter_context(bind(host, port))
        with progress_bars(not on.quiet) as bars:
            model = on.open(open_file(name), bars, batch_tokens, ranks=True)
        stack.enter_context(model)
        if pooling is not None or model.family.both_ways:
            from ..engine.embedding import pooling_of

            pooling_of(model.family, pooling)
        if on.verbose:
            say_loaded(model)

        def warn(error: BaseException | str) -> None:
            if on.verbose and isinstance(error, BaseException):
                traceback.print_exception(error)
            else:
                say(error if isinstance(error, str) else f"{type(error).__name__}: {error}")

        server = Server(
            model,
            alias or os.path.basename(name).removesuffix(".gguf"),
            min(max_logprobs, model.config.vocab_size),
            max_request_tokens,
            pooling,
            tokenize_bos,
        )
        engine = Engine(model, server.top, batch_tokens, max_queue_tokens)
        app = App(server, engine, Gate(key, max_body << 20), warn)
        serving = Serving(app.asgi, engine, listening, warn, drain)

        def end(number: int, frame: FrameType | None) -> None:
            signal.signal(number, raise_signal)
            serving.drain()

        on_signals(end)
        where = f"{model.backend.name}, {model.backend.device_name}, {model.precision}"
        on.say(f"{server.name} is served at {address_of(listening)} ({where})")
        if key is None and host not in _LOCAL:
            on.say(f"--host {host}: whoever reaches it may use it; --api-key asks for a key")
        serving.run()
