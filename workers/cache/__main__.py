"""The cache's process: predictions in, reads and schedules out."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.ring.messages import LayerPart, Message, NeuronsPredicted, PartDone, RingReady
from pipeline.ring.process import Worker, run
from pipeline.ring.timeline import ANSWERED, FORESEEN
from workers.cache.layers import LayerCache
from workers.cache.policies import make_policy
from workers.cache.policy import Policy
from workers.cache.recording import Recording
from workers.loop import serve

NAME = "cache"


def answering(worker: Worker, cache: LayerCache, recording: Recording) -> Callable[[Message], None]:
    """The handler of the ring's messages."""
    predicted = worker.segments.predicted

    def handle(message: Message) -> None:
        started = time.perf_counter()
        answer(message)
        if isinstance(message, NeuronsPredicted) and not message.step.every:
            cache.decode_seconds += time.perf_counter() - started

    timeline = worker.timeline

    def mark(message: NeuronsPredicted, event: int) -> None:
        if timeline.on and not message.guess:
            held = cache.layers[message.layer].residency.resident if event == ANSWERED else 0
            timeline.mark(event, message.step.number, message.layer, value=held)

    def answer(message: Message) -> None:
        match message:
            case NeuronsPredicted():
                mark(message, FORESEEN)
                ids = predicted[message.layer, int(message.guess), : message.listed]
                instructions = cache.handle(message, ids)
                mark(message, ANSWERED)
                recording.keep(message, ids)
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


def main(worker: Worker) -> None:
    """Answer messages until Stop."""
    plan, segments = worker.plan, worker.segments

    def policy(layer: int) -> Policy:
        return make_policy(plan.units[layer], worker.config.cache)

    hits_first = worker.config.cache.hits_first
    cache = LayerCache(plan, segments.wanted, segments.reads, policy, hits_first)
    recording = Recording.wanted()
    serve(worker, answering(worker, cache, recording), cache.stats)
    recording.write()


if __name__ == "__main__":
    run(NAME, (NAME,), main)
