"""Recency and frequency in one number: LRFU (Lee et al., 2001), between LRU and LFU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.cache.policy import Ids, WindowThenOldest

_NEVER = -1e6  # far below any level that a use gives
_RESOLUTION = 2.0**30  # of a worth, per doubling


class RecentlyFrequent(WindowThenOldest):
    """A use counts one, and half as much `half_life` tokens later; the least sum leaves first.

    All sums decay alike, so their order is that of log2 Σ 2^(t / half_life) over the times t of
    use: a number that changes only when its neuron is used. A tiny half-life is LRU, a huge one LFU.
    """

    def __init__(self, units: int, window: int, half_life: float) -> None:
        """`window` and `half_life` in tokens; window 0: no limit."""
        super().__init__(units, window)
        self._half_life = half_life
        self._level = np.full(units, _NEVER)
        self._latest = -1  # the last step of any use

    def used(self, ids: Ids, step: int) -> None:
        if step == self._latest:
            ids = ids[self._last_used[ids] != step]  # a guess and its set are one use
        self._latest = step
        self._level[ids] = np.logaddexp2(self._level.take(ids), step / self._half_life)
        super().used(ids, step)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        return (self._level.take(ids) * _RESOLUTION).astype(np.int64)
