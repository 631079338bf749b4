"""What other programs took of the processors while something was measured: it is too slow by as much."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STAT = Path("/proc/stat")
IDLE = (3, 4)  # fields of its first line: idle, and waiting for a disk
GUESTS = 8  # from here on its fields count a second time what stands in earlier ones


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds of processor time so far, of all cores together."""

    all: float
    idle: float
    own: float  # of this process and of its children that have ended

    @classmethod
    def now(cls) -> Self:
        ticks = [int(word) for word in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
        seconds = [one / os.sysconf("SC_CLK_TCK") for one in ticks[:GUESTS]]
        return cls(sum(seconds), sum(seconds[field] for field in IDLE), sum(os.times()[:4]))


def share(before: Moment, after: Moment) -> float:
    """0 to 1: of all cores' time between two moments, what neither was idle nor ours."""
    passed = after.all - before.all
    if passed <= 0:
        return 0.0
    others = passed - (after.idle - before.idle) - (after.own - before.own)
    return min(1.0, max(0.0, others / passed))
