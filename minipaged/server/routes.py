"""The HTTP routes, with API keys, size limits, timeouts and client disconnects."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minipaged.errors import InvalidRequest
from minipaged.server.answers import Prepared, no_model, prepare, refusal
from minipaged.server.counters import Stopwatch
from minipaged.server.protocol import ApiError, ChatRequest, CompletionRequest, parse
from minipaged.server.service import Service

log = logging.getLogger(__name__)
T = TypeVar("T")

# The Host headers of real loopback requests. Another name means DNS rebinding: a website's name resolves to loopback.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/health",)  # paths that need no key


class ClientGone(Exception):
    """The client has closed the connection."""


def build_app(service: Service, keys: Sequence[str] = (), local: bool = True) -> FastAPI:
    """The ASGI app. ``keys``: accepted API keys; if empty, no key is needed. ``local``: accept loopback hosts only."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.open()
        yield
        service.close()

    # FastAPI's own pages are off, because they load scripts from the internet.
    app = FastAPI(title="minipaged", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Door, keys=keys, local=local)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, lambda request, error: error_response(error))  # type: ignore[arg-type]
    app.add_exception_handler(Exception, lambda request, error: error_response(ApiError(500, "internal error")))
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        length = service.thread.engine.max_model_len  # vLLM's name; the page's settings can change it
        return {"id": service.model, "object": "model", "created": 0, "owned_by": "minipaged", "max_model_len": length}

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "stopping" if service.draining else "ok"}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise no_model(name, service.model)
        return model()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _serve(service, request, "completions", CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _serve(service, request, "chat", ChatRequest)


# --- a request, from its body to its answer ---------------------------------------------------------------------


async def _serve(
    service: Service, request: Request, name: str, kind: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    """Handles a request of either endpoint. A rejected request gets its error status even if it asked for a stream."""
    watch = service.metrics.request(name)
    try:
        body = parse(kind, await _read(request, service))
        prepared = await service.tokenize(lambda: prepare(service.thread.llm, service.model, body))
        if body.stream:
            events = _events(service, prepared, watch)
            await anext(events)  # waits until the engine has accepted the request
            return EventStream(events, service.limits.write_timeout)
        result = await _unless_gone(request, _whole(service, prepared, watch))
        watch.done(200, result["usage"])
        return JSONResponse(result)
    except (InvalidRequest, ApiError) as error:
        refused = error if isinstance(error, ApiError) else refusal(error)
        watch.done(refused.status)
        return error_response(refused)
    except (ClientGone, ClientDisconnect):  # while the engine computed; while the body was read
        watch.done("gone")
        return Response(status_code=499)  # for the log: the client is gone
    except Exception:
        watch.done(500)
        raise


async def _read(request: Request, service: Service) -> bytes:
    """The request's body. Raises `ApiError` if it is too large, too slow, or its content type is not JSON."""
    limit = service.limits.max_body
    too_large = ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
    # Browsers let a web page send other types to other sites without a preflight request, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(service.limits.body_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "the request's body did not arrive in time") from None
    return bytes(body)


async def _whole(service: Service, prepared: Prepared, watch: Stopwatch) -> dict[str, Any]:
    """The response without streaming."""
    answer, prompts, params = prepared
    newest: dict[int, Any] = {}
    async with service.admitted(), service.job(prompts, params) as job:
        async for number, output in job.outputs():
            watch.token()
            newest[number] = output
        answer.cached = sum(job.cached.values())
    return answer.whole([newest[number] for number in sorted(newest)])


async def _events(service: Service, prepared: Prepared, watch: Stopwatch) -> AsyncGenerator[str, None]:
    """The response as server-sent events; a first, empty one marks that the engine has accepted the request."""
    answer, prompts, params = prepared
    started = False
    try:
        async with service.admitted(), service.job(prompts, params) as job:
            started = True
            yield ""
            for chunk in answer.opening():
                yield _event(chunk)
            async for number, output in job.outputs():
                watch.token()
                if output.finished:
                    answer.count(output)
                for chunk in answer.chunks(number, output):
                    yield _event(chunk)
            answer.cached = sum(job.cached.values())
            last = answer.last_chunk()
            watch.done(200, last["usage"])
            if answer.include_usage:
                yield _event(last)
            yield "data: [DONE]\n\n"
    except ApiError as error:
        if not started:
            raise
        watch.done(error.status)
        yield _event(error.body())  # the status is already sent; OpenAI's client reads errors from events, too
    finally:
        if started:
            watch.done("gone")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no route {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    response = error_response(ApiError(error.status_code, words.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


# --- clients that hang up ---------------------------------------------------------------------------------------


async def _hang_up(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``. If the client disconnects first, cancels it and raises `ClientGone`."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _cancel(working, gone)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends events until they end, the client disconnects, or it reads nothing for ``patience`` seconds."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience = events, patience

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancel(sending, gone)
            await self._events.aclose()  # aborts the engine's unfinished requests

    async def _send(self, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                message = {"type": "http.response.body", "body": event.encode(), "more_body": True}
                async with asyncio.timeout(self._patience):
                    await send(message)
        except TimeoutError:
            log.warning("closed the connection of a client that had stopped reading")
            return  # uvicorn closes a connection whose response is incomplete
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Door:
    """Middleware that checks the Host header and the API key, the key in constant time (no timing attacks)."""

    def __init__(self, app: Any, keys: Sequence[str], local: bool) -> None:
        self._app, self._local = app, local
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await error_response(refusal)(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name.rpartition(":")[0] if not name.endswith("]") and ":" in name else name
        if self._local and name not in LOOPBACK_NAMES:
            return ApiError(403, "this server accepts loopback names only; start it with another --host")
        if not self._keys or path in OPEN:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Compares with every key, so that the time does not depend on which key matches.
        right = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() == b"bearer" and any(right):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
