"""How many drafts a step should verify: as many as pay, by what steps and drafts before have shown.

A step of several rows reads its units once, and computes every row: each further row has a price, in seconds,
and brings a token only if it and all drafts before it come true. Both are measured while the ring runs. What
does not pay is tried again rarely: what drafts have cost more than they brought stays below a share of the
time.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

KNOWN: Final = 3  # steps without drafts that must have been measured
RECENT: Final = 15  # steps of a kind whose median counts: disks are shared, and single steps slow
AGAIN: Final = 64  # steps with drafts after which one goes without, to be measured
MOST_LOST: Final = 0.02  # of the time of all steps, which drafts may have cost in vain …
MOST_TRIED: Final = 0.01  # … where they seem to pay, and where they do not
GRACE: Final = 1.0  # step's time that they may cost beyond that, where they seem to pay
CREDIT: Final = 10.0  # steps' time that they can have brought in advance
FADING: Final = 0.9  # what a draft weighs beside the next one of the same trust
PRIOR: Final = 2.0  # drafts' weight that an unknown trust begins with
ROW, GUESSES = 0.25, 3  # of a step's seconds: a further row's price, until so many were measured


class Worth:
    """Measures steps; seconds are the caller's."""

    def __init__(self, most: int) -> None:
        """`most` drafts a step."""
        self._most = most
        self._single: deque[float] = deque(maxlen=RECENT)  # seconds of steps without drafts
        self._row: deque[float] = deque(maxlen=RECENT)  # seconds of each further row
        self._true: dict[int, tuple[float, float]] = {}  # by trust: drafts that came true, and all
        self._seconds = 0.0  # of all steps
        self._lost = 0.0  # seconds that drafts have cost more than they brought
        self._drafting = 0  # steps with drafts since the last one without

    def count(self, trust: int, room: int) -> int:
        """How many drafts of this trust the next step should verify, at most `room`, and `trust`."""
        most = min(self._most, room, trust)
        if most < 1 or len(self._single) < KNOWN or self._drafting >= AGAIN:
            return 0
        step, row = self._prices()
        chance = self._chance(trust)
        best, gain, likely, expected = 0, 0.0, 1.0, 0.0
        for count in range(1, most + 1):
            likely *= chance
            expected += likely * step - row
            if expected > gain:
                best, gain = count, expected
        allowed = MOST_LOST * self._seconds + GRACE * step if best else MOST_TRIED * self._seconds
        if self._lost > allowed:
            return 0
        return best or 1

    def took(self, trust: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step with so many drafts of this trust is over; it brought one token more than were accepted."""
        self._seconds += seconds
        if not drafted:
            self._single.append(seconds)
            self._drafting = 0
            return
        self._drafting += 1
        step, _ = self._prices()
        self._row.append(max(0.0, seconds - step) / drafted)
        step, row = self._prices()
        self._lost = max(-CREDIT * step, self._lost + drafted * row - accepted * step)
        true, tried = self._true.get(trust, (PRIOR * trust / (trust + 2), PRIOR))
        for number in range(min(drafted, accepted + 1)):
            true = true * FADING + (number < accepted)
            tried = tried * FADING + 1
        self._true[trust] = true, tried

    def _prices(self) -> tuple[float, float]:
        """Seconds of a step without drafts, and of each further row."""
        step = median(self._single) if self._single else 0.0
        return step, median([*self._row, *[ROW * step] * (GUESSES - len(self._row))])

    def _chance(self, trust: int) -> float:
        """That a draft comes true."""
        true, tried = self._true.get(trust, (PRIOR * trust / (trust + 2), PRIOR))
        return true / tried
