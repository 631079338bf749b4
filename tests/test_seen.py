"""What compute remembers of slots, against the cache's own tables, whatever happens in between."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ring.plan import Forecast, Plan
from workers.compute.seen import Seen, Sight

UNITS, SLOTS = 8, 4


def plan() -> Plan:
    """Two layers of eight experts, four slots each."""
    return Plan(8, (UNITS, UNITS), 512, (SLOTS, SLOTS), 2, 16, 1, Forecast("router", 1, True))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def listed(sight: Sight) -> tuple[list[int], list[int]]:
    return sight.ids.tolist(), sight.slots.tolist()


def test_what_was_scheduled_is_seen_until_its_slot_has_another() -> None:
    seen = Seen(plan())
    assert listed(seen.of(0, ints(1, 2))) == ([], [])
    seen.note(0, ints(5, 1), ints(0, 3))
    assert listed(seen.of(0, ints(1, 2, 5))) == ([1, 5], [3, 0])
    assert listed(seen.of(1, ints(1, 2, 5))) == ([], []), "another layer's"
    seen.note(0, ints(2), ints(3))
    assert listed(seen.of(0, ints(1, 2, 5))) == ([2, 5], [3, 0])
    seen.note(0, ints(5), ints(1))  # moved: its old slot is nobody's
    seen.note(0, ints(7), ints(0))
    assert listed(seen.of(0, ints(2, 5, 7))) == ([2, 5, 7], [3, 1, 0])


def test_staging_is_not_remembered() -> None:
    seen = Seen(plan())
    seen.note(1, ints(3, 4), ints(2 * SLOTS, SLOTS))
    assert listed(seen.of(1, ints(3, 4))) == ([4], [SLOTS])


def test_hits_confirm_a_sight_or_correct_it() -> None:
    sight = Sight(ints(1, 4, 6), ints(3, 0, 2))
    wrong, rest = sight.confirmed(ints(1, 4, 6), ints(3, 0, 2))
    assert (wrong.tolist(), rest.tolist()) == ([], [])
    wrong, rest = sight.confirmed(ints(1, 5, 6), ints(3, 0, 1))
    assert (wrong.tolist(), rest.tolist()) == ([1, 2], [1, 2]), "4 is no hit, and 6 lies elsewhere"
    wrong, rest = sight.confirmed(ints(), ints())
    assert (wrong.tolist(), rest.tolist()) == ([0, 1, 2], [])


turns = st.lists(
    st.tuples(
        st.lists(st.integers(0, UNITS - 1), min_size=1, max_size=SLOTS, unique=True),  # a set
        st.lists(st.tuples(st.integers(0, UNITS - 1), st.integers(0, SLOTS - 1)), max_size=3),  # unseen reads
    ),
    max_size=30,
)


@given(turns)
def test_a_confirmed_expert_lies_where_it_was_computed(turns: list) -> None:
    """A model cache gives slots away unseen, then answers a set; what is confirmed lay there throughout."""
    seen, owner = Seen(plan()), dict.fromkeys(range(SLOTS), -1)
    for wanted, unseen in turns:
        chosen = np.array(sorted(wanted), np.intp)
        sight = seen.of(0, chosen)
        before = dict(owner)
        fresh: set[int] = set()
        for unit, slot in unseen:  # guesses of this turn: in flight, so they are no hits
            for other in owner:
                if owner[other] == unit:
                    owner[other] = -1
            owner[slot] = unit
            fresh.add(slot)
        place = {unit: slot for slot, unit in owner.items() if unit >= 0}
        hits = [(unit, place[unit]) for unit in chosen.tolist() if unit in place and place[unit] not in fresh]
        ids, slots = ints(*(unit for unit, _ in hits)), ints(*(slot for _, slot in hits))
        wrong, rest = sight.confirmed(ids, slots)
        right = np.delete(np.arange(sight.ids.size), wrong)
        for unit, slot in zip(sight.ids[right].tolist(), sight.slots[right].tolist(), strict=True):
            assert before[slot] == owner[slot] == unit
        assert sorted([*sight.ids[right].tolist(), *ids[rest].tolist()]) == ids.tolist()
        free = [slot for slot in owner if slot not in {place.get(unit) for unit in chosen.tolist()}]
        for unit in chosen.tolist():
            if unit not in place:
                place[unit] = free.pop()
                owner[place[unit]] = unit
        seen.note(0, ints(*chosen), ints(*(place[unit] for unit in chosen.tolist())))
