"""Policies that need to know more than the past: for comparison, not for the ring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.cache.policy import Ids, WindowThenOldest

_FOR_EVER = np.iinfo(np.int64).max
_RESOLUTION = 2.0**30  # of a worth


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


class FrequencyByAge(WindowThenOldest):
    """LFRU (vLLM's RFC 38256): uses so far ÷ tokens since the last one; the least leaves first."""

    def __init__(self, units: int) -> None:
        super().__init__(units, 0)
        self._uses = np.zeros(units, np.int64)
        self._step = -1

    def used(self, ids: Ids, step: int) -> None:
        self._uses[ids[self._last_used[ids] != step]] += 1  # a guess and its set are one use
        self._step = step
        super().used(ids, step)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        age = self._step - self._last_used[ids] + 1
        return (self._uses[ids] * _RESOLUTION / age).astype(np.int64)


# -- of one pool of slots for all layers: units are numbered layer after layer, a step is a layer's turn --


class LeastStale(WindowThenOldest):
    """SpecMD's: what was not used in this token's pass leaves first, of it the layer that comes up last."""

    def __init__(self, layers: int, units: int) -> None:
        super().__init__(layers * units, 0)
        self._layers, self._units = layers, units
        self._turn = -1

    def used(self, ids: Ids, step: int) -> None:
        self._turn = step
        super().used(ids, step)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        turn = self._turn + 1  # the one that needs room
        now = turn % self._layers
        fresh = self._last_used[ids] >= turn - now
        until = (ids // self._units - now - 1) % self._layers  # turns before the layer comes up again
        return np.where(fresh, self._layers, 0) + self._layers - until


class PooledBelady:
    """The offline optimum of one pool."""

    forgets = False

    def __init__(self, masks: npt.NDArray[np.bool_]) -> None:
        """`masks` `[layers, tokens, units]`: the whole future."""
        layers, tokens, units = masks.shape
        self._layers = layers
        self._next = np.full((tokens + 1, layers * units), _FOR_EVER, np.int64)  # turn, from each token on
        turns = np.repeat(np.arange(layers), units)
        for token in range(tokens - 1, -1, -1):
            used = masks[:, token].reshape(-1)
            self._next[token] = np.where(used, token * layers + turns, self._next[token + 1])
        self._turn = 0

    def used(self, ids: Ids, step: int) -> None:
        self._turn = step

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        return np.zeros(ids.size, np.bool_)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        token = self._turn // self._layers
        coming = self._next[token, ids]
        later: npt.NDArray[np.int64] = self._next[token + 1, ids]
        return -np.where(coming > self._turn, coming, later)
