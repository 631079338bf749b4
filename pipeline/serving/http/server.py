"""The listener: a socket, and uvicorn behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from pipeline.serving.endpoint import check_http, is_loopback
from pipeline.serving.http.api import KEEP_ALIVE, MAX_BODY, Api
from pipeline.serving.http.guard import Guard
from pipeline.serving.scheduler import Scheduler

MAX_CONNECTIONS = 512


class _Uvicorn(uvicorn.Server):
    """Signals are the serving command's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Listens from construction to `close`."""

    def __init__(
        self,
        address: str,
        scheduler: Scheduler,
        *,
        model: str,
        context: int,
        api_key: str = "",
        max_body: int = MAX_BODY,
        keep_alive: float = KEEP_ALIVE,
        disk_ceiling: float = 0.0,
    ) -> None:
        """`disk_ceiling`: bytes a second that the disk delivers, for the page; 0: not known.

        Raises UsageError for an address that may not be used, OSError when it cannot be."""
        host, port = check_http(address, api_key)
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        api = Api(
            scheduler,
            model=model,
            context=context,
            max_body=max_body,
            keep_alive=keep_alive,
            disk_ceiling=disk_ceiling,
        )
        app = Guard(Starlette(routes=api.routes()), loopback=is_loopback(host), api_key=api_key)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        self._server.should_exit = True
        await self._task
        self._socket.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return listener
