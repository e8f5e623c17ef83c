"""The endpoints, an ASGI application (starlette): each request is read within limits, parsed beside the loop that
answers clients, computed by the engine, and answered; or left, where whoever asked has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import hmac
import json
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import BackendError, KqprefillError
from .fields import ApiError, Fields
from .metrics import CONTENT_TYPE, Metrics
from .openai import Asked, Completion, Detokenize, Embeddings, Rerank, Server, Tokenize, models, tokenizer_info
from .queue import Engine, Full, Work

_BODY_SECONDS = 60.0  # that a client may take between two pieces of a body
_GONE = 499  # the status that is counted for requests whose client has gone
_THREADS = 4  # that parse and write, beside the loop


@dataclass(frozen=True)
class Gate:
    """Who and what is let in. key: that requests must carry, None for none; most_bytes: of a body."""

    key: str | None
    most_bytes: int

    def check(self, request: Request) -> None:
        """Raise ApiError (401) where the key is missing or wrong; how long that takes says nothing of it."""
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    async def body(self, request: Request) -> bytes:
        """The body. Raises ApiError (413, 408)."""
        pieces, size, stream = list[bytes](), 0, request.stream()
        while True:
            try:
                piece = await asyncio.wait_for(anext(stream, None), _BODY_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(408, f"no more of the body came for {_BODY_SECONDS:.0f} s") from None
            if piece is None:
                return b"".join(pieces)
            size += len(piece)
            if size > self.most_bytes:
                raise ApiError(413, f"the body is larger than {self.most_bytes} bytes, which are allowed")
            pieces.append(piece)


class App:
    """The application. warn(line) hears of errors that are ours, and of nothing else."""

    def __init__(self, server: Server, engine: Engine, gate: Gate, warn: Callable[[BaseException], None]) -> None:
        self._server, self._engine, self._gate, self._warn = server, engine, gate, warn
        self._metrics, self._created = Metrics(), int(time.time())
        self._threads = ThreadPoolExecutor(_THREADS, "kqprefill-serve")
        asked: dict[str, Callable[[Server, Fields], Asked]] = {
            "/v1/completions": Completion,
            "/v1/embeddings": Embeddings,
            "/v1/rerank": Rerank,
            "/rerank": Rerank,
            "/tokenize": Tokenize,
            "/detokenize": Detokenize,
        }
        told: dict[str, Callable[[], Response]] = {
            "/v1/models": lambda: _json(models(server, self._created)),
            "/tokenizer_info": lambda: _json(tokenizer_info(server)),
            "/health": self._health,
            "/metrics": lambda: Response(self._metrics.text(engine), media_type=CONTENT_TYPE),
        }
        routes = [self._route(path, "POST", self._asking(kind)) for path, kind in asked.items()]
        routes += [self._route(path, "GET", _telling(tell)) for path, tell in told.items()]
        self.asgi = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_thing})

    def _route(self, path: str, method: str, handle: Callable[[Request], Awaitable[Response | None]]) -> Route:
        """An endpoint: who asks is checked, errors become answers, and what was answered is counted."""

        async def endpoint(request: Request) -> Response:
            begin = time.monotonic()
            try:
                if path != "/health":
                    self._gate.check(request)
                response = await handle(request) or Response(status_code=_GONE)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception as error:
                response = self._failed(error)
            self._metrics.count(path, response.status_code, time.monotonic() - begin)
            return response

        return Route(path, endpoint, methods=[method])

    def _asking(self, kind: Callable[[Server, Fields], Asked]) -> Callable[[Request], Awaitable[Response | None]]:
        async def handle(request: Request) -> Response | None:
            loop = asyncio.get_running_loop()  # of what waits only the ids are kept, not the body
            asked = await loop.run_in_executor(self._threads, self._read, kind, await self._gate.body(request))
            results = await self._computed(request, asked)
            if results is None:
                return None
            return await loop.run_in_executor(self._threads, lambda: _json(asked.answer(results)))

        return handle

    def _read(self, kind: Callable[[Server, Fields], Asked], body: bytes) -> Asked:
        return kind(self._server, Fields(body))

    async def _computed(self, request: Request, asked: Asked) -> list[Any] | None:
        """The engine's results; None where the client goes before they are there."""
        if not asked.items:
            return []
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        work = Work(asked.kind, asked.items, lambda: loop.call_soon_threadsafe(ready.set))
        self._engine.submit(work)
        waiting = asyncio.ensure_future(ready.wait())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            gone.cancel()
            if not ready.is_set():
                self._engine.cancel(work)
        if not ready.is_set():
            return None
        if work.error is not None:
            raise work.error
        return work.results

    def _failed(self, error: Exception) -> Response:
        """An error as a client is told of it."""
        if isinstance(error, Full):
            error = ApiError(429, error, retry_after=error.seconds)
        elif isinstance(error, (BackendError, MemoryError)):
            self._warn(error)
            error = ApiError(500, str(error) or "out of memory")
        elif isinstance(error, KqprefillError) and not isinstance(error, ApiError):
            error = ApiError(400, error)
        elif not isinstance(error, ApiError):
            self._warn(error)
            error = ApiError(500, "an error in kqprefill itself; the server's log says more")
        path, name = self._server.model.file.path, self._server.name
        told = error.body
        told["error"]["message"] = told["error"]["message"].replace(path, name)  # where it lies is nobody's business
        response = _json(told, error.status)
        if error.retry_after is not None:
            response.headers["retry-after"] = str(error.retry_after)
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        return response

    def _health(self) -> Response:
        if self._engine.failed is not None:
            return _json({"status": "the last batch failed"}, 503)
        return _json({"status": "ok"})


def _telling(tell: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return tell()

    return handle


async def _disconnected(request: Request) -> None:
    """Return when whoever asked has gone; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """Of paths and methods that are not there."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    words = "is not answered here" if status == 404 else f"does not take {request.method}"
    return _json(ApiError(status, f"{request.url.path[:200]} {words}").body, status)


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")
