"""The loop of a worker that answers messages from one inbox until it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pipeline.ring.messages import Message, ReportStats, Stats, Stop
from pipeline.ring.process import Worker


async def serve(
    worker: Worker,
    handle: Callable[[Message], None],
    stats: Callable[[], dict[str, float]],
    *notes: str,
) -> None:
    """Say that the worker is ready, then answer until Stop. Raises what `handle` raises."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(message: Message) -> None:
        if ended.done():
            return
        if isinstance(message, Stop):
            ended.set_result(None)
            return
        try:
            if isinstance(message, ReportStats):
                worker.channel.send("supervisor", Stats(message.serial, worker.name, stats()))
            else:
                handle(message)
        except Exception as error:
            ended.set_exception(error)

    worker.channel.on_message(worker.name, receive)
    worker.ready(*notes)
    await ended
