"""Policies that need to know more than the past: for comparison, not for the ring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.cache.policy import Ids, WindowThenOldest

_FOR_EVER = np.iinfo(np.int64).max


class PinnedThenOldest(WindowThenOldest):
    """A hot set that never leaves; the others by window, then by age."""

    def __init__(self, d_ff: int, window: int, hot: npt.NDArray[np.bool_]) -> None:
        """`hot` [d_ff]: the neurons to keep."""
        super().__init__(d_ff, window)
        self._hot = hot

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        old: npt.NDArray[np.bool_] = super().expired(ids, step) & ~self._hot[ids]
        return old

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        return np.where(self._hot[ids], _FOR_EVER, super().worth(ids))


class Belady:
    """The offline optimum: who is needed again last, or never, leaves first (Belady, 1966).

    A bound for all others as long as a token's set fits into the slots.
    """

    forgets = False

    def __init__(self, masks: npt.NDArray[np.bool_]) -> None:
        """`masks` `[tokens, d_ff]`: the whole future. Steps are rows."""
        tokens, d_ff = masks.shape
        never = np.iinfo(np.int32).max
        self._next = np.full((tokens, d_ff), never, np.int32)  # use of each neuron, after each step
        coming = np.full(d_ff, never, np.int32)
        for step in range(tokens - 1, -1, -1):
            self._next[step] = coming
            coming[masks[step]] = step
        self._step = 0

    def used(self, ids: Ids, step: int) -> None:
        self._step = step

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        return np.zeros(ids.size, np.bool_)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        worth: npt.NDArray[np.int64] = -self._next[self._step, ids].astype(np.int64)
        return worth
