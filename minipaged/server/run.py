"""Starts and stops the server."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import uvicorn

from minipaged.engine_thread import EngineLoop
from minipaged.errors import InvalidConfig, PortInUse
from minipaged.models.sampling_defaults import describe
from minipaged.server.answers import model_name
from minipaged.server.counters import Metrics
from minipaged.server.routes import build_app
from minipaged.server.service import Limits, Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = "/visualizer"


class Server(uvicorn.Server):
    """Serves ``llm`` on an open socket: ``run(sockets=[bind(host, port)])``.

    When told to stop, it rejects new requests, gives those in flight ``limits.grace`` seconds to finish, and ends the
    rest with an error. With ``visualize`` the visualizer of this engine is at ``/visualizer``.
    """

    def __init__(
        self,
        llm: Any,
        *,
        name: str = "",
        keys: Sequence[str] = (),
        host: str = "127.0.0.1",
        limits: Limits | None = None,
        visualize: bool = False,
    ) -> None:
        limits = limits or Limits()
        if visualize and (keys or host not in LOOPBACK):
            raise InvalidConfig("the page checks no API key: use --visualize with a loopback --host, without --api-key")
        self.local = host in LOOPBACK
        self._page: Any = None
        if visualize:
            from visualizer.app import build

            self._page = build(llm, scenario=None, rate=None)  # starts the engine's thread
        self.thread = self._page.thread if visualize else EngineLoop(llm)
        self.service = Service(self.thread, name or model_name(llm.engine.config.model), limits, Metrics())
        app = build_app(self.service, keys, self.local)
        if visualize:
            from visualizer.app import mount

            mount(app, self._page, PAGE)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=int(limits.grace) + 5,
                limit_concurrency=limits.max_connections,
                server_header=False,
                ws="none",
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        if self._page is None:
            self.thread.start()
        try:
            await super().serve(sockets)
        finally:
            self.thread.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            page = f", the page on {url}{PAGE}" if self._page is not None else ""
            print(describe(self.thread.llm.default_params, self.thread.llm.generation_config, {}), flush=True)
            print(f"minipaged serves {self.service.model!r} on {url}/v1{page}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        if self._page is not None:
            self._page.log.close()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Opens the server's socket; call it before loading a model. Port 0 picks a free one. Raises `PortInUse`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        raise PortInUse(f"cannot listen on {host}, port {port}: {error.strerror or error}; try --port") from None
    return sock
