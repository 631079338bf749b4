"""Who leaves a layer's slots: the part of residency that is meant to be replaced and compared."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.intp]  # numpy converts narrower indices on every use, which costs more than it saves
NOTHING: Ids = np.zeros(0, np.intp)


class Policy(Protocol):
    """One layer's policy. Neurons keep their history while they are not resident."""

    def used(self, ids: Ids, step: int) -> None:
        """The neurons `ids` were computed in `step`."""

    @property
    def forgets(self) -> bool:
        """Whether neurons can expire at all."""

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        """Which of the resident neurons `ids` are to be dropped before `step`."""

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        """How much each neuron is worth keeping; the least goes first."""


class KeepNothing:
    """Every token begins with empty slots: what the window is compared with."""

    forgets = True

    def used(self, ids: Ids, step: int) -> None:
        """Nothing is remembered."""

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        return np.ones(ids.size, np.bool_)

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        return np.zeros(ids.size, np.int64)


class WindowThenOldest:
    """The paper's window: what was not used in the last `window` tokens goes; then the least recent."""

    def __init__(self, units: int, window: int) -> None:
        """`window` in tokens; 0: no limit."""
        self._window = window
        self._last_used = np.full(units, -1, np.int64)  # in steps; -1: never

    def used(self, ids: Ids, step: int) -> None:
        self._last_used[ids] = step

    @property
    def forgets(self) -> bool:
        return self._window > 0

    def expired(self, ids: Ids, step: int) -> npt.NDArray[np.bool_]:
        old: npt.NDArray[np.bool_] = self._last_used[ids] < step - self._window
        return old

    def worth(self, ids: Ids) -> npt.NDArray[np.int64]:
        return self._last_used[ids]
