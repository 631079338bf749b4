"""One layer's residency: scenarios, and a state machine against a plain model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.cache.policy import WindowThenOldest
from workers.cache.residency import NOWHERE, Residency, least

D_FF = 12


def ids(*neurons: int) -> np.ndarray:
    return np.array(neurons, np.int32)


def residency(slots: int, window: int = 0) -> Residency:
    return Residency(D_FF, slots, WindowThenOldest(D_FF, window))


def resident(cache: Residency) -> set[int]:
    return set(cache.id_of[cache.id_of != NOWHERE].tolist())


def turn(cache: Residency, step: int, *neurons: int) -> None:
    """Compute `neurons` in `step`, admitting what is missing as far as there is room."""
    cache.begin(step)
    wanted = ids(*neurons)
    missing = wanted[cache.lease(wanted) == NOWHERE]
    cache.admit(missing[: cache.make_room(missing.size)])
    cache.use(wanted, step)
    cache.validate()


def test_the_least_recently_used_goes_first():
    cache = residency(slots=3)
    turn(cache, 0, 1, 2, 3)
    turn(cache, 1, 1, 3)
    turn(cache, 2, 7)
    assert resident(cache) == {1, 3, 7}
    turn(cache, 3, 1)
    turn(cache, 4, 8)
    assert resident(cache) == {1, 7, 8}
    assert cache.evictions == 2


def test_a_neuron_takes_over_its_victims_slot():
    cache = residency(slots=3)
    turn(cache, 0, 1, 2, 3)
    turn(cache, 1, 1, 3)
    slot = cache.slot_of[2]
    turn(cache, 2, 9)
    assert cache.slot_of[9] == slot


@pytest.mark.parametrize(("window", "left"), [(0, {1, 2, 3}), (1, {3}), (2, {2, 3})])
def test_the_window_drops_what_was_not_used_in_its_tokens(window: int, left: set[int]):
    cache = residency(slots=5, window=window)
    for step, neuron in enumerate((1, 2, 3)):
        turn(cache, step, neuron)
    cache.begin(3)
    assert resident(cache) == left
    assert cache.dropped == 3 - len(left)
    assert cache.evictions == 0


def test_leased_neurons_are_no_victims():
    cache = residency(slots=2)
    turn(cache, 0, 1, 2)
    cache.begin(1)
    cache.lease(ids(1))
    assert cache.make_room(2) == 1
    assert resident(cache) == {1}


def test_a_read_in_flight_is_no_victim_until_the_turn_ends():
    cache = residency(slots=1)
    turn(cache, 0, 4)
    assert cache.in_flight[cache.slot_of[4]]
    assert cache.make_room(1) == 0
    cache.begin(1)
    assert not cache.in_flight.any()
    assert cache.make_room(1) == 1


def test_neurons_take_free_slots_in_ascending_order():
    cache = residency(slots=4)
    cache.admit(ids(3, 5, 9))
    assert cache.slot_of[[3, 5, 9]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("slots", [0, 1])
def test_too_many_neurons_are_refused(slots: int):
    with pytest.raises(AssertionError, match="more neurons than free slots"):
        residency(slots).admit(ids(1, 2))


def test_a_second_slot_for_a_neuron_is_refused():
    cache = residency(slots=3)
    cache.admit(ids(1))
    with pytest.raises(AssertionError, match="admitted again"):
        cache.admit(ids(1))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda cache: cache.id_of.__setitem__(2, 1), "two slots"),
        (lambda cache: cache.slot_of.__setitem__(1, 1), "inverse"),
        (lambda cache: cache.slot_of.__setitem__(5, 2), "empty slot"),
        (lambda cache: cache.leased.__setitem__(0, False), "no lease"),
        (lambda cache: cache.leased.__setitem__(2, True), "empty slot is leased"),
        (lambda cache: cache.leased.__setitem__(NOWHERE, True), "sentinel"),
        (lambda cache: setattr(cache, "_empty", np.arange(2)), "list of empty slots"),
    ],
)
def test_validate_sees(break_it, message):
    cache = residency(slots=3)
    cache.admit(ids(1, 2))
    cache.validate()
    break_it(cache)
    with pytest.raises(AssertionError, match=message):
        cache.validate()


@settings(max_examples=50, deadline=None)
@given(worth=st.lists(st.integers(-1, 5), max_size=20), data=st.data())
def test_the_least_are_found_the_first_of_equal_ones(worth: list[int], data: st.DataObject):
    count = data.draw(st.integers(0, len(worth)))
    expected = sorted(range(len(worth)), key=lambda place: (worth[place], place))[:count]
    assert sorted(least(np.array(worth, np.int64), count).tolist()) == sorted(expected)


NEURONS = st.sets(st.integers(0, D_FF - 1))


class Machine(RuleBasedStateMachine):
    """Random turns; the model is what is resident, named and in flight, and when it was used."""

    @initialize(slots=st.integers(0, D_FF), window=st.integers(0, 3))
    def start(self, slots: int, window: int) -> None:
        self.slots, self.window, self.step = slots, window, 0
        self.cache = residency(slots, window)
        self.resident: set[int] = set()
        self.named: set[int] = set()
        self.flying: set[int] = set()
        self.used: dict[int, int] = {}

    def age(self, neuron: int) -> int:
        return self.used.get(neuron, -1)

    @rule()
    def begin(self) -> None:
        self.step += 1
        self.cache.begin(self.step)
        self.named, self.flying = set(), set()
        if self.window:
            self.resident = {n for n in self.resident if self.age(n) >= self.step - self.window}

    @rule(neurons=NEURONS)
    def lease(self, neurons: set[int]) -> None:
        slots = self.cache.lease(ids(*sorted(neurons)))
        assert [n for n, slot in zip(sorted(neurons), slots, strict=True) if slot != NOWHERE] == sorted(
            neurons & self.resident
        )
        self.named |= neurons & self.resident

    @rule(neurons=NEURONS)
    def use(self, neurons: set[int]) -> None:
        self.cache.use(ids(*sorted(neurons)), self.step)
        self.used.update(dict.fromkeys(neurons, self.step))

    @rule(neurons=NEURONS)
    def admit(self, neurons: set[int]) -> None:
        absent = sorted(neurons - self.resident)
        room = self.cache.make_room(len(absent))
        left = resident(self.cache)
        gone = self.resident - left
        assert not gone & self.named
        assert room == min(len(absent), self.slots - len(left))
        if gone:
            assert len(left) + len(absent) >= self.slots
            staying = [self.age(n) for n in left - self.named]
            assert not staying or max(self.age(n) for n in gone) <= min(staying)
        self.cache.admit(ids(*absent[:room]))
        self.resident = left | set(absent[:room])
        self.named |= set(absent[:room])
        self.flying |= set(absent[:room])

    @precondition(lambda self: self.named)
    @rule(wanted=st.integers(0, D_FF))
    def evict(self, wanted: int) -> None:
        evicted = self.cache.evict(wanted)
        gone = self.resident - resident(self.cache)
        assert len(gone) == evicted == min(wanted, len(self.resident - self.named))
        self.resident -= gone

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.validate()
        assert resident(self.cache) == self.resident
        flying = np.flatnonzero(self.cache.in_flight)
        assert set(self.cache.id_of[flying].tolist()) == self.flying
        assert set(self.cache.id_of[np.flatnonzero(self.cache.leased)].tolist()) == self.named


TestResidency = Machine.TestCase
TestResidency.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
