"""Where compute last saw each unit: its first word on where a token's experts lie, before the cache's.

The cache answers a set some hundred microseconds after it was sent. Nearly always the experts that it calls
hits lie where they lay in an earlier step, so compute begins with those at once. The schedule then confirms
them: what it lists as a hit in the same slot has lain there since, because a slot is given to another unit
only for a read, and what is read in this step is no hit. Others are forgotten, and computed as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.ring.plan import Plan
from workers.compute.device import I32, ApartFfn, Bytes, LayerFfn
from workers.routing import Ids

_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Sight:
    """Units and the slots in which they were last seen: both [n], ids ascending."""

    ids: I32
    slots: I32

    def confirmed(self, ids: I32, slots: I32) -> tuple[I32, I32]:
        """Places of this sight's units that do not stand so among `ids` and `slots`, a layer's hits, and
        places of the hits that are not of this sight; ids ascend."""
        if np.array_equal(ids, self.ids) and np.array_equal(slots, self.slots):
            return _NONE, _NONE
        _, own, listed = np.intersect1d(self.ids, ids, assume_unique=True, return_indices=True)
        same = self.slots[own] == slots[listed]
        wrong = np.delete(np.arange(self.ids.size, dtype=np.int32), own[same])
        rest = np.delete(np.arange(ids.size, dtype=np.int32), listed[same])
        return wrong, rest


_NONE: I32 = np.zeros(0, np.int32)


class Seen:
    """Of every layer, which unit lay in which slot when it was last scheduled."""

    def __init__(self, plan: Plan) -> None:
        self._slots = [np.full(units, _NOWHERE, np.int32) for units in plan.units]
        self._owners = np.full(plan.total_slots, _NOWHERE, np.int32)  # of a slot, of its layer

    def of(self, layer: int, ids: Ids) -> Sight:
        """Those of the units `ids`, ascending, that have been seen."""
        slots = self._slots[layer].take(ids)
        known = slots != _NOWHERE
        return Sight(ids[known].astype(np.int32), slots[known])

    def note(self, layer: int, ids: I32, slots: I32) -> None:
        """Units were scheduled in these slots. Those of staging are not kept."""
        kept = slots < self._owners.size
        ids, slots = ids[kept], slots[kept]
        of_layer = self._slots[layer]
        gone = self._owners[slots]
        of_layer[gone[gone != _NOWHERE]] = _NOWHERE
        left = of_layer[ids]
        self._owners[left[left != _NOWHERE]] = _NOWHERE
        of_layer[ids], self._owners[slots] = slots, ids


class HeadStart:
    """A ring's tokens' experts, computed before the cache has answered, and set right afterwards."""

    def __init__(self, plan: Plan) -> None:
        self._seen = Seen(plan)
        self._sight: tuple[Sight, ApartFfn[Any]] | None = None  # of the layer at hand, until its part 0
        self.mistaken = 0  # experts that lay elsewhere, since the start

    def begin(self, layer: int, ids: Ids, ffn: LayerFfn[Any], memory: Bytes) -> None:
        """Add those of the units `ids`, ascending, that have been seen, if `ffn` can forget them."""
        if not isinstance(ffn, ApartFfn):
            return
        sight = self._seen.of(layer, ids)
        ffn.add(sight.ids, sight.slots, memory)
        self._sight = sight, ffn

    def rest(self, layer: int, number: int, ids: I32, slots: I32) -> tuple[I32, I32]:
        """Of the layer's part of this number what is to be added yet; what lay elsewhere is forgotten."""
        if number == 0 and self._sight is not None:
            (sight, ffn_of_sight), self._sight = self._sight, None
            wrong, rest = sight.confirmed(ids, slots)
            ids, slots = ids[rest], slots[rest]
            if wrong.size:
                ffn_of_sight.forget(sight.ids[wrong])
                self.mistaken += wrong.size
        if ids.size:
            self._seen.note(layer, ids, slots)
        return ids, slots
