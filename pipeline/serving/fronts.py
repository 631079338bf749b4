"""The serving process: a warm ring, its queue, and the fronts that were asked for."""

from __future__ import annotations

import asyncio
import importlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.ending import asked_to_end
from pipeline.launch import SERVE_EXTRA
from pipeline.planner.probe import probe_rate
from pipeline.serving.endpoint import CurveKeys
from pipeline.serving.observer import Observer
from pipeline.serving.opening import OpenRing
from pipeline.serving.scheduler import Scheduler
from pipeline.serving.server import MAX_MESSAGE, Server
from storage.errors import UsageError


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """What `serve` was asked for."""

    endpoint: str
    http: str = ""  # HOST:PORT; empty: no HTTP
    keys: CurveKeys | None = None
    api_key: str = ""
    queue_limit: int = 64  # requests
    longest: float = 3600.0  # seconds
    max_message: int = MAX_MESSAGE  # bytes of one ZeroMQ frame and of one HTTP body


def check_http_packages() -> None:
    """Raise UsageError where what `http` needs is not installed."""
    try:
        importlib.import_module("pipeline.serving.http.server")
        importlib.import_module("pipeline.serving.prometheus")
    except ImportError as error:
        raise UsageError(f"--http needs more packages: {SERVE_EXTRA} ({error})") from error


async def serve(opened: OpenRing, options: ServingOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Raises RingGaveUp when the ring has died too often.

    Takes the ring over: it is closed at the end, also when a front cannot start (UsageError, OSError).
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, *asked_to_end()):
        loop.add_signal_handler(number, stopped.set)
    scheduler = Scheduler(
        opened.ring,
        queue_limit=options.queue_limit,
        longest=options.longest,
        observer=_observer(with_metrics=bool(options.http)),
    )
    try:
        async with _Fronts(opened, options, scheduler) as fronts:
            for line in fronts.lines:
                say(line)
            await _until_over(scheduler, stopped)
    finally:
        await scheduler.stop()
    if scheduler.failed.done():
        scheduler.failed.result()


async def _until_over(scheduler: Scheduler, stopped: asyncio.Event) -> None:
    waiting = asyncio.ensure_future(stopped.wait())
    ends: list[asyncio.Future[Any]] = [waiting, scheduler.failed]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await scheduler.stop()  # the last words go out while the fronts still stand


def _observer(*, with_metrics: bool) -> Observer:
    if not with_metrics:
        return Observer()
    from pipeline.serving.prometheus import PrometheusObserver

    return PrometheusObserver()


class _Fronts:
    """The ZeroMQ server and, where asked for, the HTTP server."""

    def __init__(self, opened: OpenRing, options: ServingOptions, scheduler: Scheduler) -> None:
        self._opened = opened
        self._options = options
        self._scheduler = scheduler
        self.lines: list[str] = []

    async def __aenter__(self) -> _Fronts:
        options, context = self._options, self._opened.plan.context
        self._zmq = Server(
            options.endpoint,
            self._scheduler,
            model=self._opened.name,
            context=context,
            keys=options.keys,
            max_message=options.max_message,
        )
        self.lines.append(f"serving {self._opened.name} at {self._zmq.endpoint}")
        self._http = None
        if options.http:
            from pipeline.serving.http.server import HttpServer
            from pipeline.serving.prometheus import PrometheusObserver

            observer = self._scheduler.observer
            assert isinstance(observer, PrometheusObserver)
            observer.watch(self._scheduler)
            try:
                self._http = HttpServer(
                    options.http,
                    self._scheduler,
                    model=self._opened.name,
                    context=context,
                    api_key=options.api_key,
                    max_body=options.max_message,
                    disk_ceiling=0.0 if self._opened.plan.whole else probe_rate(self._opened.store),
                )
            except BaseException:
                self._zmq.close()
                raise
            self.lines.append(f"serving {self._opened.name} at {self._http.url}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()
        self._zmq.close()
