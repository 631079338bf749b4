"""The rows of units in the memory of the slots."""

from __future__ import annotations

from storage.layout import Rows, Unit
from workers.compute.device import Bytes


class UnitRows:
    """A unit's rows in the memory of the slots, by role; made again where that is another array."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self._memory: Bytes | None = None
        self._views: dict[str, Rows] = {}

    def of(self, memory: Bytes) -> dict[str, Rows]:
        """Views of `memory` [slots, stride]."""
        if memory is not self._memory:
            self._memory = memory
            self._views = {row.role: self.unit.view(memory, row.role) for row in self.unit.rows}
        return self._views
