"""The loop of a worker that answers messages from one inbox until it is told to stop.

It waits in ZeroMQ itself. An event loop between the two took 30 µs of a core for each message, since the
kernels next to it push its code out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.ring.messages import Message, ReportStats, Stats, Stop
from pipeline.ring.process import Worker
from pipeline.ring.promptness import be_prompt


def serve(
    worker: Worker,
    handle: Callable[[Message], None],
    stats: Callable[[], dict[str, float]],
    *notes: str,
) -> None:
    """Say that the worker is ready, then answer until Stop. Raises what `handle` raises."""
    be_prompt()
    worker.ready(*notes)
    while not isinstance(message := worker.channel.receive(worker.name), Stop):
        if isinstance(message, ReportStats):
            worker.channel.send("supervisor", Stats(message.serial, worker.name, stats()))
        elif message is not None:
            handle(message)
