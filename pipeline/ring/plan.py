"""The plan: sizes that everything in one ring agrees on, fixed before the workers start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Plan:
    """How the memory of one ring is divided.

    Slots are numbered over the whole ring: layer l owns `first_slot(l) .. + slots[l] - 1`; the two
    staging halves follow the last layer's, `staging` slots each.
    """

    layers: int
    d_model: int
    d_ff: int
    stride: int  # bytes of a bundle's slot
    slots: tuple[int, ...]  # per layer
    staging: int  # slots of one staging half
    context: int  # tokens of KV cache
    hidden_rows: int  # rows of the hidden segment per layer: the window's tokens in prefill
    lookahead: int
    pinned: frozenset[int]
    cache_dtype: str = "float32"  # of keys and values
    early: bool = False  # hidden states are announced before their layer's attention

    @property
    def total_slots(self) -> int:
        """Slots of all layers, without staging."""
        return sum(self.slots)

    def first_slot(self, layer: int) -> int:
        return sum(self.slots[:layer])

    def first_staging_slot(self, half: int) -> int:
        return self.total_slots + half * self.staging

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "pinned": sorted(self.pinned)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        return cls(**{**data, "slots": tuple(data["slots"]), "pinned": frozenset(data["pinned"])})
