"""A server in a thread of the test's own process, with a loop that the test can ask things of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fake_session import CONTEXT, FastSession

from pipeline.config import Decoding
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.http.server import HttpServer
from pipeline.serving.prometheus import PrometheusObserver
from pipeline.serving.scheduler import Scheduler
from pipeline.serving.server import Server
from pipeline.serving.warm_ring import WarmRing

Result = TypeVar("Result")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


class Served:
    """What a test may touch of a running server."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.scheduler: Scheduler
        self.server: Server
        self.endpoint = ""
        self.http: HttpServer | None = None
        self.url = ""

    def ask(self, question: Callable[[], Result]) -> Result:
        """Evaluate on the server's loop."""

        async def answer() -> Result:
            return question()

        return asyncio.run_coroutine_threadsafe(answer(), self.loop).result(30)

    def until(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until something holds on the server's loop."""

        async def wait() -> None:
            async with asyncio.timeout(seconds):
                while not holds():  # noqa: ASYNC110 - nothing tells it
                    await asyncio.sleep(0.002)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(seconds + 5)


@contextmanager
def served(
    base: Path,
    open_session: Callable[[], Any] = FastSession,
    endpoint: str = "",
    clock: Callable[[], float] | None = None,
    queue_limit: int = 64,
    http: dict[str, Any] | None = None,
    defaults: Decoding | None = None,
    template: str = TEMPLATE,
    state: Callable[[], object] = lambda: None,
    **options: Any,
) -> Iterator[Served]:
    """Serve what `open_session` gives until the block is left; then nothing may be left over."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server-loop")
    thread.start()
    found = Served(loop)
    extra = {"clock": clock} if clock else {}

    def start() -> None:
        ring = WarmRing(open_session, ChatTemplate(template, {}), defaults, state=state, **extra)
        observer = PrometheusObserver()
        found.scheduler = Scheduler(ring, queue_limit=queue_limit, observer=observer)
        observer.watch(found.scheduler)
        found.server = Server(
            endpoint or f"ipc://{base / 'ring.sock'}",
            found.scheduler,
            model="fake",
            context=CONTEXT,
            **options,
        )
        found.endpoint = found.server.endpoint
        if http is not None:
            address = http.pop("address", "127.0.0.1:0")
            found.http = HttpServer(address, found.scheduler, model="fake", context=CONTEXT, **http)
            found.url = found.http.url

    async def stop() -> None:
        await found.scheduler.stop()
        if found.http is not None:
            await found.http.close()
        found.server.close()
        if found.scheduler.failed.done():
            found.scheduler.failed.exception()

    try:
        found.ask(start)
        try:
            yield found
        finally:
            asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
        assert not thread.is_alive()
