"""The server (uvicorn) in a thread of its own, while the engine has the thread that has opened the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import logging
import socket
import sys
from threading import Thread
import time
from typing import Any

import uvicorn

from ..errors import InputError, KqprefillError
from .queue import Engine

_BACKLOG = 2048  # connections that the system keeps while none of them is accepted
_LOOK_SECONDS = 0.1  # after which it is looked again whether the server can end
_SWITCH_SECONDS = 1e-4  # after which a thread that computes in Python lets the engine's go on with its launches


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet; port 0: any that is free. Raises InputError,
    KqprefillError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise KqprefillError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return bound


def address_of(listening: socket.socket) -> str:
    """The address at which clients find it, as in `http://127.0.0.1:8080`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Serving:
    """uvicorn in a thread, with an ASGI application behind a socket; the engine computes in the caller's thread.

    warn(line) hears of what uvicorn complains of. patience: seconds that clients may take for their answers when the
    server is to end and all is computed.
    """

    def __init__(
        self, app: Any, engine: Engine, listening: socket.socket, warn: Callable[[str], None], patience: float
    ) -> None:
        self._engine, self._listening, self._warn, self._patience = engine, listening, warn, patience
        self._error: BaseException | None = None
        listening.listen(_BACKLOG)
        _hear("uvicorn", warn)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", server_header=False, backlog=_BACKLOG
            )
        )
        self._thread = Thread(target=self._serve, name="kqprefill-http", daemon=True)

    def run(self) -> None:
        """Answer until `drain` has been called and all that came before is answered. Raises what ended it else."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()
        self._engine.run()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Accept no more; `run` returns when what waits is answered, and the answers are read or patience has ended. No
        lock is taken: it may be called on a signal."""
        self._uvicorn.should_exit = True

    async def _answer(self) -> None:
        """Run uvicorn, and part with the clients that keep it from ending."""
        ended = asyncio.create_task(self._uvicorn.serve(sockets=[self._listening]))
        idle_since: float | None = None
        while not (await asyncio.wait((ended,), timeout=_LOOK_SECONDS))[0]:
            if not self._uvicorn.should_exit or self._engine.has_work:
                idle_since = None
                continue
            now = time.monotonic()
            idle_since = now if idle_since is None else idle_since
            connections = list(self._uvicorn.server_state.connections)
            if connections and now - idle_since >= self._patience:
                what = "their clients took no answer, or sent no whole request,"
                self._warn(
                    f"connections closed at the end: {len(connections)}; {what} for {self._patience:g} s (--drain)"
                )
                for connection in connections:
                    connection.transport.abort()
        await ended

    def _serve(self) -> None:
        try:
            asyncio.run(self._answer())
        except BaseException as error:
            self._error = error
        finally:
            self._engine.close()


class _Handler(logging.Handler):
    """Hands what is logged on, a line each."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        self._warn(record.getMessage().splitlines()[0] if record.getMessage() else record.name)


def _hear(name: str, warn: Callable[[str], None]) -> None:
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [_Handler(warn)], False
