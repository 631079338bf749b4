"""Units compared with their checksums when they have arrived, before anybody hears of them.

`storage.verify` says which: every unit, one of `SAMPLE` (much damage is found after a few tokens, at a
sixteenth of the cost), or none. What differs is read once more, past whatever was wrong on its way; what
still differs is damaged where it lies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from storage.errors import StoreCorrupt
from storage.store import Store
from storage.sums import UnitSums, damaged_unit

SAMPLE = 16  # of so many units one is compared, in mode sample

I32 = npt.NDArray[np.int32]


class Verifier:
    """Compares what was read into slots."""

    def __init__(self, store: Store, sums: UnitSums, memory: npt.NDArray[np.uint8], every: int) -> None:
        """`memory` `[slots, bytes]`; of `every` units one is compared."""
        self._store, self._sums = store, sums
        self._view, self._stride = memory.reshape(-1).data, memory.shape[1]
        self._every = every
        self._skip = 0  # units until the next that is compared
        self.verified = 0
        self.read_again = 0

    @classmethod
    def wanted(cls, mode: str, store: Store, memory: npt.NDArray[np.uint8]) -> tuple[Verifier | None, str]:
        """As `storage.verify` says, and a note on it. Raises StoreCorrupt for damaged checksums."""
        if mode == "off":
            return None, "units not verified, as configured"
        sums = UnitSums.of(store)
        if sums is None:
            return None, "units not verified, because the store has no checksums: convert again"
        if mode == "always":
            return cls(store, sums, memory, 1), "every unit verified"
        return cls(store, sums, memory, SAMPLE), f"one unit of {SAMPLE} verified"

    def wrong(self, layer: int, positions: I32, slots: I32) -> tuple[I32, I32]:
        """Positions and slots of the units that are not what was written, of those that are compared."""
        if self._every > 1:
            chosen = slice(self._skip, None, self._every)
            self._skip = (self._skip - positions.size) % self._every
            positions, slots = positions[chosen], slots[chosen]
        self.verified += positions.size
        found = self._sums.wrong(layer, positions, slots, self._view, self._stride)
        self.read_again += len(found)
        return positions[found], slots[found]

    def check(self, layer: int, positions: I32, slots: I32) -> None:
        """What was read again. Raises StoreCorrupt, naming the first that is still wrong."""
        found = self._sums.wrong(layer, positions, slots, self._view, self._stride)
        if found:
            raise StoreCorrupt(damaged_unit(self._store, layer, int(positions[found[0]])))
