"""Coordinate descent with paired measurements; what is measured, and how, is the caller's.

From what is set, one knob after the other is turned to its neighbouring values, as far as that helps. A
value is compared with what is best so far in pairs, in turn, so that a neighbour who disturbs for seconds
disturbs both: one pair decides whether it is worth two more, and then the medians and most of the pairs
decide. At the end the best found is held against the beginning in new pairs, and stays only if it is
quicker there, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pipeline.tuning.knobs import Knob, Settings, Value
from storage.errors import FlashringError

MARGIN: Final = 0.01  # of the time: what is less than that quicker is not
PAIRS: Final = 3  # of a comparison that is not over after the first
FINAL: Final = 4  # of the last one

Measure = Callable[[Settings], float]  # seconds a token; raises FlashringError for settings that cannot be


@dataclass(frozen=True, slots=True)
class Compared:
    """Seconds a token of two settings, run in turn."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def better(self) -> bool:
        """Whether what comes after is quicker, in medians and in most pairs."""
        if not self.after:
            return False
        wins = sum(late < early for early, late in zip(self.before, self.after, strict=True))
        medians = statistics.median(self.before), statistics.median(self.after)
        return medians[1] < (1 - MARGIN) * medians[0] and 2 * wins > len(self.after)


@dataclass(frozen=True, slots=True)
class Tried:
    """One value of one knob."""

    key: str
    value: Value
    compared: Compared
    taken: bool
    refused: str = ""  # why it could not be measured


@dataclass(slots=True)
class Outcome:
    """What the search came to; `settings` are `beginning` where nothing was quicker."""

    beginning: dict[str, Value]
    settings: dict[str, Value]
    tried: list[Tried] = field(default_factory=list)
    last: Compared = field(default_factory=lambda: Compared((), ()))  # beginning and best, in new pairs
    measured: int = 0  # trials
    in_time: bool = True  # every knob was turned

    @property
    def changes(self) -> dict[str, Value]:
        """What differs from the beginning."""
        return {key: value for key, value in self.settings.items() if value != self.beginning[key]}


def search(
    knobs: Sequence[Knob],
    beginning: Settings,
    measure: Measure,
    left: Callable[[], float],
    tell: Callable[[Tried], None] = lambda _: None,
) -> Outcome:
    """Turn knobs while there is time. `left`: seconds to the end; the last comparison keeps its own.

    Raises FlashringError where the beginning itself cannot be measured.
    """
    run = _Run(Outcome(dict(beginning), dict(beginning)), measure, left, tell)
    run.measure(beginning)  # what cannot run at all is said at once, and how long a trial takes is known
    turned = True
    while turned:
        turned = False
        for knob in knobs:
            if not run.has_time():
                run.outcome.in_time = False
                break
            turned |= run.turn(knob)
        if not run.outcome.in_time:
            break
    run.finish()
    return run.outcome


@dataclass(slots=True)
class _Run:
    """A search that is under way."""

    outcome: Outcome
    _measure: Measure
    _left: Callable[[], float]
    _tell: Callable[[Tried], None]
    _seen: set[tuple[tuple[str, Value], ...]] = field(default_factory=set)
    _first: float = 0.0  # seconds of the first trial, whose kernels, files and pages may be cold
    _spent: float = 0.0  # seconds of the others

    def measure(self, settings: Settings) -> float:
        before = self._left()
        taken = self._measure(settings)
        seconds = before - self._left()
        if self.outcome.measured:
            self._spent += seconds
        else:
            self._first = seconds
        self.outcome.measured += 1
        return taken

    def _pairs(self) -> float:
        """For how many there is time."""
        others = self.outcome.measured - 1
        each = self._spent / others if others else self._first
        return self._left() / (2 * each) if each else math.inf

    def has_time(self) -> bool:
        """For one more pair, and the last comparison behind it.

        The first pair tells how long they take, and is tried where there is time for twice as much.
        """
        return self._pairs() > (2 if self.outcome.measured == 1 else 1 + FINAL)

    def turn(self, knob: Knob) -> bool:
        """Whether the knob was left elsewhere than it was."""
        there = self.outcome.settings[knob.key]
        for direction in knob.beside(there):
            for value in direction:
                if not self.has_time() or not self._takes(knob.key, value):
                    break
            if self.outcome.settings[knob.key] != there:
                return True  # what helped one way is not tried the other
        return False

    def _takes(self, key: str, value: Value) -> bool:
        """Whether a value is quicker than what is best so far, and so takes its place."""
        candidate = {**self.outcome.settings, key: value}
        name = tuple(sorted(candidate.items()))
        if name in self._seen:
            return False
        self._seen.add(name)
        try:
            compared = self._compare(self.outcome.settings, candidate, PAIRS, early=True)
        except FlashringError as error:
            self._add(Tried(key, value, Compared((), ()), taken=False, refused=str(error)))
            return False
        if compared.better:
            self.outcome.settings = candidate
        self._add(Tried(key, value, compared, taken=compared.better))
        return compared.better

    def _compare(self, first: Settings, second: Settings, pairs: int, *, early: bool) -> Compared:
        """In turn, and each of them first every other time.

        `early`: one lost pair is enough, and one that was won where there is no time for more.
        """
        before: list[float] = []
        after: list[float] = []
        for number in range(pairs):
            order = [(second, after), (first, before)] if number % 2 else [(first, before), (second, after)]
            for settings, taken in order:
                taken.append(self.measure(settings))
            if early and (after[0] >= before[0] or not self.has_time()):
                break
        return Compared(tuple(before), tuple(after))

    def finish(self) -> None:
        """Keep the beginning unless there is time for new pairs, and the best found is quicker there, too."""
        outcome = self.outcome
        if not outcome.changes:
            return
        if self._pairs() < FINAL:
            outcome.settings = dict(outcome.beginning)
            return
        outcome.last = self._compare(outcome.beginning, outcome.settings, FINAL, early=False)
        if not outcome.last.better:
            outcome.settings = dict(outcome.beginning)

    def _add(self, one: Tried) -> None:
        self.outcome.tried.append(one)
        self._tell(one)
