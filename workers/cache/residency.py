"""One layer's residency: which neuron sits in which slot. Pure: no sockets, no clock, no bytes.

A neuron that was admitted in the current turn, one (step, layer), is *in flight*: neither a hit nor
a victim. A slot that was named in the turn is *leased*: no victim. Both end with the turn, for
compute finishes a layer only when every part of it has arrived.

Slots are numbered from 0 here; the plan says where the layer's slots begin.

A turn costs by the number of array operations: next to kernels that fill the caches each takes three
microseconds, and a third of that alone. Hence `take`, `nonzero`, and a list of the empty slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.cache.policy import Ids, Policy

NOWHERE = -1  # as a slot or an id; also indexes the sentinel behind the last slot, which stays False


class Residency:
    """Slots of one layer. Arrays of ids have no duplicates."""

    def __init__(self, units: int, slots: int, policy: Policy) -> None:
        self.slots = slots
        self.slot_of = np.full(units, NOWHERE, np.intp)
        self.id_of = np.full(slots, NOWHERE, np.intp)
        self.leased = np.zeros(slots + 1, np.bool_)
        self.in_flight = np.zeros(slots + 1, np.bool_)
        self._empty = np.arange(slots)  # slots without a neuron, ascending
        self.evictions = 0  # neurons that lost their slot to another, since the start
        self.dropped = 0  # neurons that fell out of the window, since the start
        self._policy = policy

    @property
    def free(self) -> int:
        """Slots without a neuron."""
        return self._empty.size

    @property
    def resident(self) -> int:
        """Slots with a neuron."""
        return self.slots - self._empty.size

    def begin(self, step: int) -> None:
        """Start the next turn: leases and reads in flight have ended, old neurons are dropped."""
        self.leased[:] = False
        self.in_flight[:] = False
        if self._policy.forgets:
            occupied = np.flatnonzero(self.id_of != NOWHERE)
            expired = self._policy.expired(self.id_of[occupied], step)
            self.dropped += self._vacate(occupied[expired])

    def settle(self, certain: Ids, doubtful: Ids) -> Ids:
        """The set, ascending: `certain`, and those of `doubtful` that have a slot, be it in flight."""
        present = doubtful[self.slot_of[doubtful] != NOWHERE]
        return np.sort(np.concatenate((certain, present))) if present.size else certain

    def prefer(self, listed: Ids) -> Ids:
        """The set, ascending: of as many neurons as are listed by their ids, some of them by stand-ins.

        A stand-in is listed as ~id, and taken only where it has a slot. Neurons with a slot are always in the
        set; instead of the others, they or stand-ins are taken in the order of the list.
        """
        own = listed >= 0
        ids = np.where(own, listed, ~listed)
        present = self.slot_of[ids] != NOWHERE
        taken = own & present
        open_places = np.count_nonzero(own) - np.count_nonzero(taken)
        taken[(own != present).nonzero()[0][:open_places]] = True
        return np.sort(ids[taken])

    def lease(self, ids: Ids) -> Ids:
        """Protect the resident ones among `ids`; returns all their slots, NOWHERE for the others."""
        slots: Ids = self.slot_of.take(ids)
        self.leased[slots] = True
        self.leased[NOWHERE] = False
        return slots

    def release(self) -> None:
        """End the turn's leases, but for those of reads in flight."""
        self.leased[:] = self.in_flight

    def evict(self, wanted: int) -> int:
        """Take the slots of up to `wanted` unleased neurons, worth least first; returns how many."""
        unleased = ~self.leased[:-1]
        unleased[self._empty] = False
        candidates = unleased.nonzero()[0]
        if wanted < candidates.size:
            candidates = candidates[least(self._policy.worth(self.id_of.take(candidates)), wanted)]
        evicted = self._vacate(candidates)
        self.evictions += evicted
        return evicted

    def admit(self, ids: Ids) -> None:
        """Give free slots, ascending, to the absent neurons `ids`: they are now in flight and leased."""
        slots = self._empty[: ids.size]
        assert slots.size == ids.size, "more neurons than free slots"
        assert self.slot_of.take(ids).max(initial=NOWHERE) == NOWHERE, "a resident neuron is admitted again"
        self._empty = self._empty[ids.size :]
        self.id_of[slots] = ids
        self.slot_of[ids] = slots
        self.leased[slots] = True
        self.in_flight[slots] = True

    def make_room(self, wanted: int) -> int:
        """Evict until `wanted` slots are free, as far as leases allow; returns how many of them are."""
        if wanted > self.free:
            self.evict(wanted - self.free)
        return min(wanted, self.free)

    def use(self, ids: Ids, step: int) -> None:
        """The turn computes `ids`, and they are worth keeping."""
        self._policy.used(ids, step)

    def _vacate(self, slots: npt.NDArray[np.intp]) -> int:
        self.slot_of[self.id_of.take(slots)] = NOWHERE
        self.id_of[slots] = NOWHERE
        self._empty = np.concatenate((self._empty, slots)) if self._empty.size else slots
        self._empty.sort()
        return int(slots.size)

    def validate(self) -> None:
        """Assert what must hold between any two calls."""
        occupied = np.flatnonzero(self.id_of != NOWHERE)
        ids = self.id_of[occupied]
        assert np.unique(ids).size == ids.size, "a neuron sits in two slots"
        assert (self.slot_of[ids] == occupied).all(), "slot_of is not the inverse of id_of"
        assert np.count_nonzero(self.slot_of != NOWHERE) == ids.size, "slot_of names an empty slot"
        empty = np.flatnonzero(self.id_of == NOWHERE)
        assert np.array_equal(self._empty, empty), "the list of empty slots is wrong"
        assert not (self.in_flight & ~self.leased).any(), "a read in flight has no lease"
        named = np.flatnonzero(self.leased[:-1])
        assert (self.id_of[named] != NOWHERE).all(), "an empty slot is leased"
        assert not self.leased[NOWHERE], "the sentinel is leased"
        assert not self.in_flight[NOWHERE], "the sentinel is in flight"


def least(worth: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.intp]:
    """Places of the `count` smallest values; among equal ones, the first.

    A partition of the values and comparisons: argpartition takes ten times as long.
    """
    if not count:
        return np.zeros(0, np.intp)
    limit = np.partition(worth, count - 1)[count - 1]
    least: npt.NDArray[np.intp] = (worth <= limit).nonzero()[0]
    if least.size == count:
        return least
    below = np.flatnonzero(worth < limit)
    return np.concatenate((below, np.flatnonzero(worth == limit)[: count - below.size]))
