"""Collects the parts in which a layer arrives, from two senders, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.ring.messages import LayerPart, Message


@dataclass(frozen=True, slots=True)
class Part:
    """One part: `count` neurons at `start` of the layer's table of wanted ones."""

    number: int
    start: int
    count: int
    closes: bool  # ends a group, which can now be summed
    staged: bool  # closing parts are to be answered by PartDone
    whole: int  # neurons of all of the layer's parts together


@dataclass(slots=True)
class _Arrived:
    """What is known of one layer of one step."""

    schedule: LayerPart | None = None
    numbers: set[int] = field(default_factory=set)


class Parts:
    """Parts of every layer under way; early ones are kept until the schedule and all before are there."""

    def __init__(self, receive: Callable[[], Message]) -> None:
        self._receive = receive
        self._layers: dict[tuple[int, int], _Arrived] = {}

    def of(self, step: int, layer: int) -> Iterator[Part]:
        """Every part of (step, layer), each as soon as it and all earlier ones have arrived."""
        key = (step, layer)
        arrived = self._layers.setdefault(key, _Arrived())
        start = number = 0
        while arrived.schedule is None or number < len(arrived.schedule.counts):
            if arrived.schedule is None or number not in arrived.numbers:
                self._wait()
                continue
            schedule = arrived.schedule
            counts, closes = schedule.counts, schedule.closes
            yield Part(number, start, counts[number], closes[number], schedule.staged, sum(counts))
            start += counts[number]
            number += 1
        del self._layers[key]

    def _wait(self) -> None:
        message = self._receive()
        if not isinstance(message, LayerPart):
            raise TypeError(f"compute's inbox takes layer parts, not {type(message).__name__}")
        arrived = self._layers.setdefault((message.step, message.layer), _Arrived())
        if message.part in arrived.numbers:
            raise RuntimeError(f"part {message.part} of layer {message.layer} arrived twice")
        arrived.numbers.add(message.part)
        if message.part == 0:
            arrived.schedule = message
