"""The cache's process: predictions in, reads and plans out."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.messages import EVERY, LayerPart, Message, NeuronsPredicted, PartDone, RingReady
from pipeline.process import Worker, run
from workers.cache.layers import LayerCache
from workers.cache.policy import WindowThenOldest
from workers.serving import serve

NAME = "cache"


def answering(worker: Worker, cache: LayerCache) -> Callable[[Message], None]:
    """The handler of the ring's messages."""
    predicted = worker.segments.predicted

    def handle(message: Message) -> None:
        match message:
            case NeuronsPredicted():
                listed = message.keep if message.count == EVERY else message.count
                ids = None if listed == EVERY else predicted[message.layer, int(message.guess), :listed]
                instructions = cache.handle(message, ids)
            case PartDone():
                instructions = cache.handle(message)
            case RingReady():
                return
            case _:
                raise TypeError(f"the cache takes no {type(message).__name__}")
        for instruction in instructions:
            to = "compute" if isinstance(instruction, LayerPart) else "prefetcher"
            worker.channel.send(to, instruction)

    return handle


async def main(worker: Worker) -> None:
    """Answer messages until Stop."""
    window, d_ff = worker.config.cache.window, worker.plan.d_ff
    cache = LayerCache(
        worker.plan,
        worker.segments.active,
        worker.segments.reads,
        lambda layer: WindowThenOldest(d_ff, window),
    )
    await serve(worker, answering(worker, cache), cache.stats)


if __name__ == "__main__":
    run(NAME, (NAME,), main)
