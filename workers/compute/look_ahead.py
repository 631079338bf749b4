"""A shadow's guesses: while a layer's full rows are read, those of the next one are foreseen and asked for.

In a parallel block a layer's units are chosen before its attention, and reads have that time. In a sequential
one they are known behind attention only. There the input of the layer before is scored by the next layer's
low-bit rows, in the time in which compute would wait for reads; what the layer's own input then wants besides
is read as ever. A guess waits for all reads that somebody waits for, and no text hangs on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.ring.messages import NeuronsPredicted, Step
from pipeline.ring.plan import Plan
from pipeline.ring.segments import Segments
from workers.compute.shadow import Shadow

_SMOOTH = 0.1  # weight of the latest layer in what is expected of the next


@dataclass(slots=True)
class Pace:
    """Whether reads leave compute the time that a guess takes."""

    cost: float = 0.0  # seconds of a guess
    idle: float = 0.0  # seconds that a layer would wait without one

    @property
    def pays(self) -> bool:
        return self.idle >= self.cost

    def guessed(self, seconds: float) -> None:
        self.cost = _towards(self.cost, seconds)

    def waited(self, seconds: float) -> None:
        self.idle = _towards(self.idle, seconds)


def _towards(known: float, latest: float) -> float:
    return latest if known == 0 else known + _SMOOTH * (latest - known)


class LookAhead:
    """Guesses of one ring; without a shadow, or where the plan allows none, it makes none."""

    def __init__(self, shadow: Shadow[Any] | None, plan: Plan, segments: Segments, channel: Any) -> None:
        """`channel`: a `ring_units.Line`."""
        self._shadow = shadow if plan.forecast.guesses != 0 and not plan.forecast.low else None
        self._plan, self._segments, self._channel = plan, segments, channel
        self._pace = Pace()
        self._spent = 0.0  # seconds of the layer at hand

    def wanted(self, index: int, every: bool) -> bool:
        """Whether layer `index` may be guessed in this step."""
        if self._shadow is None or every or index >= self._plan.layers or index in self._plan.forecast.pinned:
            return False
        return self._shadow.foresees(index) and self._pace.pays

    def guess(self, run: int, step: Step, index: int, x: Any, done: int) -> None:
        """Ask for the units of layer `index`, from the FFN input of the layer before, [1, d_model]."""
        assert self._shadow is not None
        started = time.perf_counter()
        ids = self._shadow.foresee(index, x)
        self._segments.predicted[index, 1, : ids.size] = ids
        message = NeuronsPredicted(run, step, index, True, False, int(ids.size), 0, None, done)
        self._channel.send("cache", message)
        self._spent = time.perf_counter() - started
        self._pace.guessed(self._spent)

    def waited(self, seconds: float) -> None:
        """A token's layer has waited so long for reads, beside what a guess took."""
        self._pace.waited(seconds + self._spent)
        self._spent = 0.0
