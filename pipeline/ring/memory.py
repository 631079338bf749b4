"""Memory of the ring's processes, as the kernel accounts it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path


def proportional_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of all `pids` together, in bytes: shared pages count once.

    Processes that have gone count as nothing. On systems without /proc the result is 0.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


class PeakMemory:
    """The largest proportional set size seen, sampled at most every `interval` seconds.

    A sample walks the page tables of the slots, for up to 100 ms at 7 GB on busy cores: it may take a
    hundredth of the time.
    """

    def __init__(self, pids: Iterable[int], interval: float = 1.0) -> None:
        self._pids = tuple(pids)
        self._interval = interval
        self._next = 0.0
        self.bytes = 0

    def sample(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment >= self._next:
            self.bytes = max(self.bytes, proportional_bytes(self._pids))
            took = time.monotonic() - moment
            self._next = moment + max(self._interval, 100 * took)
