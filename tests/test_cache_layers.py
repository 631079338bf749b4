"""The cache of all layers: scenarios with the instructions that must come, and random rings."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ring.messages import EMBEDDING, LayerPart, NeuronsPredicted, PartDone, ReadBundles, Step
from pipeline.ring.plan import Forecast, Kind, Plan
from pipeline.ring.segments import ID, SLOT
from workers.cache.layers import LayerCache
from workers.cache.policy import WindowThenOldest
from workers.cache.residency import NOWHERE
from workers.predictor.targets import Target, targets, targets_of_choice

RUN = 7


def plan(
    slots: tuple[int, ...],
    units: int = 8,
    staging: int = 2,
    lookahead: int = 1,
    refine: bool = False,
    kind: Kind = "lowrank",
) -> Plan:
    return Plan(
        d_model=4,
        units=(units,) * len(slots),
        stride=512,
        slots=slots,
        staging=staging,
        context=16,
        hidden_rows=1,
        forecast=Forecast(kind, lookahead, refine),
    )


def step_of(number: int, every: bool = False) -> Step:
    return Step(number, number, 2 if every else 1, every)


class Bench:
    """A cache and its tables, spoken to in few words."""

    def __init__(self, chosen: Plan, window: int = 0, hits_first: bool = True) -> None:
        self.plan = chosen
        shape = (chosen.layers, 2, chosen.most_units)
        self.wanted, self.reads = np.full(shape, -9, np.int32), np.full(shape, -9, np.int32)
        self.cache = LayerCache(
            chosen,
            self.wanted,
            self.reads,
            lambda layer: WindowThenOldest(chosen.units[layer], window),
            hits_first,
        )

    def tell(self, step: int, layer: int, *ids: int, doubtful=(), guess: bool = False, done=None):
        return self._send(step_of(step), layer, (*ids, *doubtful), done, guess, doubtful=len(doubtful))

    def guess(self, step: int, layer: int, *ids: int):
        return self.tell(step, layer, *ids, guess=True)

    def every(self, step: int, layer: int, *keep: int, guess: bool = False):
        """A prefill's prediction."""
        return self._send(step_of(step, every=True), layer, keep, None, guess, every=True, keep=len(keep))

    def chosen(self, step: int, layer: int, keep: tuple[int, ...], *others: int):
        """Of a mixture's prompt."""
        return self._send(step_of(step, every=True), layer, (*keep, *others), None, False, keep=len(keep))

    def all(self, step: int, layer: int, guess: bool = False):
        """Every neuron in decode."""
        return self._send(step_of(step), layer, (), None, guess, every=True)

    def _send(self, step, layer, ids, done, guess, every=False, doubtful=0, keep=None):
        before = (step.number - 1) * self.plan.layers + layer if done is None else done
        certain = 0 if every else len(ids) - doubtful
        message = NeuronsPredicted(RUN, step, layer, guess, every, certain, doubtful, keep, before)
        instructions = self.cache.handle(message, np.array(ids, np.int32))
        self.cache.validate()
        return instructions

    def done(self, step: int, layer: int, part: int):
        return self.cache.handle(PartDone(RUN, step, layer, part))

    def table(self, table: np.ndarray, layer: int, start: int, count: int) -> list[tuple[int, int]]:
        rows = slice(start, start + count)
        return list(zip(table[layer, ID, rows].tolist(), table[layer, SLOT, rows].tolist(), strict=True))

    def parts(self, layer: int, instruction: LayerPart) -> list[list[tuple[int, int]]]:
        """(id, slot) of every part that part 0 announces."""
        starts = np.cumsum((0, *instruction.counts))
        return [
            self.table(self.wanted, layer, int(start), count)
            for start, count in zip(starts, instruction.counts, strict=False)
        ]

    def asked(self, instruction: ReadBundles) -> list[tuple[int, int]]:
        return self.table(self.reads, instruction.layer, instruction.start, instruction.count)


def read(
    step: int, layer: int, part: int, start: int, count: int, every: bool = False, guess: bool = False
) -> ReadBundles:
    return ReadBundles(RUN, step_of(step, every), layer, part, start, count, guess)


def part0(step: int, layer: int, counts, closes, staged: bool = False) -> LayerPart:
    return LayerPart(RUN, step, layer, 0, counts, closes, staged)


def test_large_misses_are_parts_of_their_own():
    """A token's, so that one is computed while the next is read; a prefill's come together."""
    bench = Bench(replace(plan((5, 8), refine=True), stride=1 << 20))
    bench.tell(0, 0, 1, 6)
    assert bench.guess(1, 0, 3, 4) == [read(1, 0, 1, 0, 2, guess=True)]
    schedule = part0(1, 0, (1, 1, 1, 1), (False, False, False, True))
    assert bench.tell(1, 0, 0, 1, 3, 7) == [read(1, 0, 2, 2, 1), read(1, 0, 3, 3, 1), schedule]
    assert [[one for one, _ in part] for part in bench.parts(0, schedule)] == [[1], [3], [0], [7]]
    assert bench.table(bench.reads, 0, 2, 2) == [
        bench.parts(0, schedule)[2][0],
        bench.parts(0, schedule)[3][0],
    ]
    assert bench.every(2, 1) == [read(2, 1, 1, 0, 8, every=True), part0(2, 1, (0, 8), (False, True))]


def test_hits_may_be_kept_back_until_the_misses_are_there():
    """In one part, also large ones; a prefill's are as ever."""
    bench = Bench(replace(plan((5, 8), refine=True), stride=1 << 20), hits_first=False)
    schedule = part0(0, 0, (0, 2), (False, True))
    assert bench.tell(0, 0, 1, 6) == [read(0, 0, 1, 0, 2), schedule]
    assert bench.tell(1, 0, 1, 6) == [part0(1, 0, (2,), (True,))]
    assert bench.guess(2, 0, 3, 4) == [read(2, 0, 1, 0, 2, guess=True)]
    schedule = part0(2, 0, (0, 0, 4), (False, False, True))
    assert bench.tell(2, 0, 0, 1, 3, 7) == [read(2, 0, 2, 2, 2), schedule]
    assert [[one for one, _ in part] for part in bench.parts(0, schedule)] == [[], [], [0, 1, 3, 7]]
    bench.tell(2, 1, 0, 1)
    assert bench.guess(3, 1, 5) == [read(3, 1, 1, 0, 1, guess=True)]
    assert bench.tell(3, 1, 0, 1) == [part0(3, 1, (0, 2), (False, True))], "a wrong guess is awaited, too"
    assert bench.every(4, 1) == [read(4, 1, 1, 0, 5, every=True), part0(4, 1, (3, 5), (False, True))]


def test_misses_are_read_and_then_hits():
    bench = Bench(plan((4, 4)))
    assert bench.tell(0, 1, 2, 5) == [read(0, 1, 1, 0, 2), part0(0, 1, (0, 2), (False, True))]
    assert bench.table(bench.reads, 1, 0, 2) == [(2, 4), (5, 5)]  # layer 1's slots begin at 4
    assert bench.tell(1, 1, 2, 5) == [part0(1, 1, (2,), (True,))]
    assert bench.table(bench.wanted, 1, 0, 2) == [(2, 4), (5, 5)]
    assert bench.tell(2, 1, 1, 5) == [read(2, 1, 1, 0, 1), part0(2, 1, (1, 1), (False, True))]
    assert bench.parts(1, part0(2, 1, (1, 1), (False, True))) == [[(5, 5)], [(1, 6)]]


def test_an_empty_set_is_one_empty_part():
    assert Bench(plan((4,))).tell(0, 0) == [part0(0, 0, (0,), (True,))]


def test_a_guess_starts_reads_and_the_set_decides():
    bench = Bench(plan((6,)))
    assert bench.guess(0, 0, 1, 2, 3) == [read(0, 0, 1, 0, 3, guess=True)]
    instructions = bench.tell(0, 0, 2, 3, 6)
    assert instructions == [read(0, 0, 2, 3, 1), part0(0, 0, (0, 2, 1), (False, False, True))]
    assert bench.parts(0, instructions[-1]) == [[], [(2, 1), (3, 2)], [(6, 3)]]
    assert bench.asked(instructions[0]) == [(6, 3)]
    stats = bench.cache.stats()
    assert (stats["decode_hits"], stats["decode_misses"], stats["decode_wasted"]) == (0, 4, 1)


def test_a_wrong_guess_is_still_a_part():
    bench = Bench(plan((6,)))
    bench.guess(0, 0, 1, 2)
    assert bench.tell(0, 0, 5) == [read(0, 0, 2, 2, 1), part0(0, 0, (0, 0, 1), (False, False, True))]
    bench.guess(1, 0, 6)
    assert bench.tell(1, 0, 5) == [part0(1, 0, (1, 0), (False, True))]


def test_a_doubtful_neuron_is_wanted_only_where_it_is_resident():
    bench = Bench(plan((6,)))
    bench.tell(0, 0, 2, 5)
    instructions = bench.tell(1, 0, 1, 3, 5, doubtful=(2, 4))
    assert instructions == [read(1, 0, 1, 0, 2), part0(1, 0, (2, 2), (False, True))]
    assert bench.parts(0, instructions[-1]) == [[(2, 0), (5, 1)], [(1, 2), (3, 3)]]
    assert bench.tell(2, 0, doubtful=(4,)) == [part0(2, 0, (0,), (True,))]


def test_a_doubtful_neuron_is_wanted_where_a_guess_is_reading_it():
    bench = Bench(plan((6,)))
    bench.guess(0, 0, 2, 4)
    instructions = bench.tell(0, 0, 1, doubtful=(2, 3))
    assert instructions == [read(0, 0, 2, 2, 1), part0(0, 0, (0, 1, 1), (False, False, True))]
    assert bench.parts(0, instructions[-1]) == [[], [(2, 0)], [(1, 2)]]


def test_a_guess_of_residents_asks_for_nothing_and_protects_them():
    bench = Bench(plan((2,)))
    bench.tell(0, 0, 1, 2)
    assert bench.guess(1, 0, 1) == []
    assert bench.guess(1, 0, 3, 4) == [read(1, 0, 1, 0, 1, guess=True)]  # only 2's slot is to be had
    assert bench.asked(read(1, 0, 1, 0, 1)) == [(3, 1)]
    assert bench.tell(1, 0, 1, 3) == [part0(1, 0, (1, 1), (False, True))]


def test_more_misses_than_slots_become_groups():
    bench = Bench(plan((2,), staging=2))
    bench.tell(0, 0, 3, 4)
    instructions = bench.tell(1, 0, 0, 1, 2, 3, 5, 6, 7)
    assert instructions == [
        read(1, 0, 1, 0, 3),
        read(1, 0, 2, 3, 2),
        part0(1, 0, (0, 4, 2, 1), (False, True, True, True), staged=True),
    ]
    # Neuron 0 takes 4's slot, 3 is a hit; slots 2, 3 and 4, 5 are the staging halves.
    assert bench.parts(0, instructions[-1]) == [
        [],
        [(0, 1), (1, 2), (2, 3), (3, 0)],
        [(5, 4), (6, 5)],
        [(7, 2)],
    ]
    assert bench.asked(instructions[0]) == [(0, 1), (1, 2), (2, 3)]
    assert bench.done(1, 0, 1) == [read(1, 0, 3, 5, 1)]
    assert bench.done(1, 0, 2) == []
    assert bench.done(1, 0, 3) == []
    assert bench.cache.idle
    assert bench.cache.stats()["staged"] == 5


def test_a_guess_before_groups_is_an_empty_part():
    bench = Bench(plan((2,), staging=2))
    assert bench.guess(0, 0, 1, 6, 7) == [read(0, 0, 1, 0, 2, guess=True)]
    instructions = bench.tell(0, 0, 1, 2, 7)
    assert instructions == [
        read(0, 0, 2, 2, 2),
        part0(0, 0, (0, 0, 3), (False, False, True), staged=True),
    ]
    assert bench.parts(0, instructions[-1])[2] == [(1, 0), (2, 2), (7, 3)]


def test_groups_of_two_layers_take_halves_in_turn():
    bench = Bench(plan((0, 0), units=6, staging=2))
    first, second = bench.tell(0, 0, 0, 1, 2), bench.tell(0, 1, 0, 1, 2)
    assert first == [
        read(0, 0, 1, 0, 2),
        read(0, 0, 2, 2, 1),
        part0(0, 0, (0, 2, 1), (False, True, True), staged=True),
    ]
    assert second == [part0(0, 1, (0, 2, 1), (False, True, True), staged=True)]
    assert bench.parts(1, second[0]) == [[], [(0, 0), (1, 1)], [(2, 2)]]
    assert bench.done(0, 0, 1) == [read(0, 1, 1, 0, 2)]
    assert bench.done(0, 0, 2) == [read(0, 1, 2, 2, 1)]
    with pytest.raises(AssertionError, match="before part"):
        bench.done(0, 1, 2)


def test_a_cold_cache_is_filled_by_a_prefill_kept_neurons_first():
    bench = Bench(plan((4,), units=6, staging=4))
    instructions = bench.every(0, 0, 1, 4, 5)
    assert instructions == [
        read(0, 0, 1, 0, 6, every=True),
        part0(0, 0, (0, 6), (False, True), staged=True),
    ]
    assert bench.parts(0, instructions[-1])[1] == [(0, 0), (1, 1), (2, 4), (3, 5), (4, 2), (5, 3)]
    assert bench.done(0, 0, 1) == []
    assert bench.tell(1, 0, 1, 4, 5) == [part0(1, 0, (3,), (True,))]
    bench.tell(2, 0, 3)  # takes the slot of 0, which nobody asked to keep
    assert bench.tell(3, 0, 1, 4, 5) == [part0(3, 0, (3,), (True,))]
    stats = bench.cache.stats()
    assert (stats["stream_hits"], stats["stream_misses"], stats["staged"]) == (0, 6, 2)


def test_kept_neurons_evict_others_in_a_prefill_which_are_staged():
    bench = Bench(plan((2,), units=4, staging=4))
    bench.tell(0, 0, 1)
    bench.tell(1, 0, 0)
    instructions = bench.every(2, 0, 1, 3)  # 1 is the older one, and kept
    assert bench.parts(0, instructions[-1])[1] == [(0, 2), (1, 0), (2, 3), (3, 1)]
    assert bench.asked(instructions[0]) == [(0, 2), (2, 3), (3, 1)]
    bench.done(2, 0, 1)
    assert bench.tell(3, 0, 1, 3) == [part0(3, 0, (2,), (True,))]


def test_every_neuron_in_decode_keeps_the_same_residents():
    bench = Bench(plan((3,), units=5, staging=2))
    assert bench.all(0, 0)[-1].staged
    bench.done(0, 0, 1)
    for step in (1, 2):
        assert bench.all(step, 0) == [
            read(step, 0, 1, 0, 2),
            part0(step, 0, (0, 5), (False, True), staged=True),
        ]
        bench.done(step, 0, 1)
    stats = bench.cache.stats()
    assert (stats["decode_hits"], stats["decode_misses"], stats["evictions"]) == (6, 9, 0)
    assert (stats["layer.0.hits"], stats["layer.0.misses"]) == (6, 9)


def test_a_pinned_layer_is_read_once():
    bench = Bench(plan((5,), units=5))
    assert bench.all(0, 0, guess=True) == [read(0, 0, 1, 0, 5, guess=True)]
    assert bench.all(0, 0) == [part0(0, 0, (0, 5), (False, True))]
    assert bench.all(1, 0, guess=True) == []
    assert bench.all(1, 0) == [part0(1, 0, (5,), (True,))]


def test_layers_may_differ_in_units_and_have_none():
    bench = Bench(replace(plan((0, 4)), units=(0, 4)))
    assert bench.all(0, 0) == [part0(0, 0, (0,), (True,))]
    assert bench.every(1, 0) == [part0(1, 0, (0,), (True,))]
    assert bench.all(1, 1) == [read(1, 1, 1, 0, 4), part0(1, 1, (0, 4), (False, True))]
    assert bench.all(2, 1) == [part0(2, 1, (4,), (True,))]


def test_out_of_the_window_is_no_hit():
    bench = Bench(plan((4,)), window=1)
    bench.tell(0, 0, 1, 2)
    assert bench.tell(1, 0, 1) == [part0(1, 0, (1,), (True,))]
    assert bench.tell(2, 0, 1, 2)[0] == read(2, 0, 1, 0, 1)
    assert bench.cache.stats()["dropped"] == 1


def test_a_layer_in_use_is_refused():
    bench = Bench(plan((4,)))
    bench.tell(0, 0, 1)
    with pytest.raises(AssertionError, match="two sets"):
        bench.tell(0, 0, 1)
    assert bench.guess(0, 0, 1) == [], "of no use after its set, which may have come by another way"
    with pytest.raises(AssertionError, match="still in use"):
        bench.tell(1, 0, 1, done=-1)


def test_stats_name_what_the_summary_needs():
    stats = Bench(plan((4, 3))).cache.stats()
    assert (stats["slots"], stats["resident"]) == (7, 0)
    assert {"decode_hits", "decode_misses", "decode_wasted", "stream_hits", "stream_misses"} < stats.keys()


# -- random rings -------------------------------------------------------------------------------


def mixture(*slots: int, staging: int = 2) -> Bench:
    return Bench(plan(slots, staging=staging, refine=True, kind="router"))


def test_a_prompts_experts_come_by_groups_of_half_a_staging():
    """Those that are resident take part in their order, and are not read again."""
    bench = mixture(8, 6)
    bench.tell(0, 0, 3)
    instructions = bench.chosen(1, 0, (1, 3, 6), 7, 2)
    reads = [read(1, 0, 1, 0, 2, every=True), read(1, 0, 2, 2, 2, every=True)]
    assert instructions == [*reads, part0(1, 0, (0, 3, 2), (False, True, True))]
    assert [[one for one, _ in part] for part in bench.parts(0, instructions[-1])] == [[], [1, 2, 3], [6, 7]]
    assert [bench.asked(one) for one in reads] == [[(1, 1), (2, 2)], [(6, 3), (7, 4)]]
    assert bench.chosen(2, 0, (1, 3), 7) == [part0(2, 0, (3,), (True,))]
    assert bench.cache.stats()["stream_misses"] == 4
    assert bench.cache.stats()["stream_hits"] == 4


def test_a_cold_cache_keeps_the_most_used_experts_of_a_prompt():
    bench = mixture(4, staging=4)
    instructions = bench.chosen(0, 0, (2, 6), 5, 0, 1)
    assert bench.parts(0, instructions[-1])[1] == [(0, 0), (1, 4), (2, 1), (5, 2)]  # 4 is a staging slot
    assert bench.parts(0, instructions[-1])[2] == [(6, 3)]
    assert [one.staged for one in instructions if isinstance(one, LayerPart)] == [True]


def test_a_prompts_last_experts_evict_first_what_is_not_wanted():
    bench = mixture(4, staging=4)
    bench.tell(0, 0, 0, 1)
    bench.tell(1, 0, 2, 3)
    instructions = bench.chosen(2, 0, (5, 6), 0, 1)  # the oldest two are wanted
    assert bench.parts(0, instructions[-1])[1:] == [[(0, 0), (1, 1), (5, 2), (6, 3)]]
    instructions = bench.chosen(3, 0, (4, 7, 3), 5, 6)
    assert bench.cache.layers[0].residency.slot_of[[3, 4, 7]].min() != NOWHERE, "what is to be kept is"
    assert sum(one.count for one in instructions if isinstance(one, ReadBundles)) == 4


@dataclass
class World:
    """Predictor, prefetcher, memory and compute, as PROTOCOL.md has them, in a random order.

    A slot's bytes are (layer, id); they are garbage from the read's request to its end.
    """

    random: Random
    plan: Plan
    window: int
    hits_first: bool
    bench: Bench = field(init=False)
    predictions: deque = field(default_factory=deque)
    credits: deque = field(default_factory=deque)
    outstanding: list = field(default_factory=list)  # (ReadBundles, its rows)
    arrived: dict = field(default_factory=dict)  # (step, layer) → {part: LayerPart}
    sets: dict = field(default_factory=dict)  # (step, layer) → ids
    doubtful: dict = field(default_factory=dict)  # (step, layer) → ids that may be left out
    done: int = -1
    bundles_read: int = 0
    ahead: int = -1  # layer whose set this prompt has had already

    def __post_init__(self) -> None:
        self.bench = Bench(self.plan, self.window, self.hits_first)
        self.memory: dict[int, object] = {}

    def targets(self, step: Step, source: int) -> list[Target]:
        if not (step.every and self.plan.forecast.routed) or self.plan.whole:
            return targets(self.plan.forecast, self.plan.layers, source, step.every)
        found = targets_of_choice(
            self.plan, source, self.random.randint(0, 12), asked=source == self.ahead != EMBEDDING
        )
        self.ahead = found[-1].layer if found and found[-1].layer > source else EMBEDDING
        return found

    def announce(self, step: Step, source: int) -> None:
        for target in self.targets(step, source):
            units = self.plan.units[target.layer]
            chosen = np.flatnonzero([self.random.random() < 0.4 for _ in range(units)]).astype(np.int32)
            every = target.every or self.random.random() < 0.1
            keep = (None if self.random.random() < 0.3 else chosen.size) if every else None
            doubtful = 0
            if step.every and not every:
                self.sets[step.number, target.layer] = chosen.tolist()
                listed = np.array(self.random.sample(chosen.tolist(), chosen.size), np.int32)
                keep = self.random.randint(0, chosen.size)
                listed[:keep].sort()
                message = NeuronsPredicted(
                    RUN, step, target.layer, False, False, chosen.size, 0, keep, self.done
                )
                self.predictions.append((message, listed))
                continue
            if not target.guess:
                self.sets[step.number, target.layer] = range(units) if every else chosen.tolist()
                if not every:
                    left = np.array([self.random.random() < 0.3 for _ in chosen], np.bool_)
                    self.doubtful[step.number, target.layer] = chosen[left].tolist()
                    chosen, doubtful = np.concatenate((chosen[~left], chosen[left])), np.count_nonzero(left)
            listed = chosen if not every or keep is not None else chosen[:0]
            certain = 0 if every else chosen.size - doubtful
            message = NeuronsPredicted(
                RUN, step, target.layer, target.guess, every, certain, doubtful, keep, self.done
            )
            self.predictions.append((message, listed))

    def events(self) -> list:
        """What may happen next besides compute's own steps."""
        found = []
        if self.predictions:
            found.append(lambda: self.carry_out(self.predict(*self.predictions.popleft())))
        if self.credits:
            found.append(lambda: self.carry_out(self.bench.cache.handle(self.credits.popleft())))
        found.extend(lambda at=at: self.complete(at) for at in range(len(self.outstanding)))
        return found

    def predict(self, message: NeuronsPredicted, ids: np.ndarray) -> list:
        """Tell the cache; of a set's doubtful neurons, those that have a slot are to be computed."""
        instructions = self.bench.cache.handle(message, ids)
        key = (message.step.number, message.layer)
        if not message.guess and (doubtful := self.doubtful.get(key)):
            slot_of = self.bench.cache.layers[message.layer].residency.slot_of
            self.sets[key] = [one for one in self.sets[key] if one not in doubtful or slot_of[one] != NOWHERE]
        return instructions

    def carry_out(self, instructions: list) -> None:
        self.bench.cache.validate()
        for instruction in instructions:
            if isinstance(instruction, LayerPart):  # the schedule
                self.arrived.setdefault((instruction.step, instruction.layer), {})[0] = instruction
                continue
            rows = self.bench.asked(instruction)
            self.bundles_read += len(rows)
            if not instruction.guess:
                doubtful = self.doubtful.get((instruction.step.number, instruction.layer), [])
                assert not {neuron for neuron, _ in rows} & set(doubtful), "a doubtful neuron is read"
            for _, slot in rows:
                assert self.memory.get(slot) != "garbage", "two reads into one slot"
                self.memory[slot] = "garbage"
            self.outstanding.append((instruction, rows))

    def complete(self, at: int) -> None:
        message, rows = self.outstanding.pop(at)
        for neuron, slot in rows:
            self.memory[slot] = (message.layer, neuron)
        parts = self.arrived.setdefault((message.step.number, message.layer), {})
        assert message.part not in parts
        parts[message.part] = message

    def wait(self, step: int, layer: int, part: int) -> None:
        """Let things happen until the part is there; sometimes longer."""
        while True:
            parts = self.arrived.get((step, layer), {})
            ready = 0 in parts and part in parts
            if ready and self.random.random() < 0.5:
                return
            events = self.events()
            if not events:
                assert ready, f"the ring is stuck at part {part} of layer {layer}"
                return
            self.random.choice(events)()

    def compute(self, step: int, layer: int) -> None:
        """Receive a layer, and find every neuron's bytes in its slot from its part to its sum."""
        self.wait(step, layer, 0)
        announced = self.arrived[step, layer][0]
        tables = self.bench.parts(layer, announced)
        assert len(tables) == len(announced.closes)
        assert announced.closes[-1]
        computed: list[int] = []
        group: list[tuple[int, int]] = []
        for part, table in enumerate(tables):
            self.wait(step, layer, part)
            group += table
            for neuron, slot in group:
                assert self.memory[slot] == (layer, neuron)
            if announced.closes[part]:
                computed += sorted(neuron for neuron, _ in group)
                group = []
                if announced.staged:
                    self.credits.append(PartDone(RUN, step, layer, part))
        assert computed == list(self.sets[step, layer])
        assert len(self.arrived.pop((step, layer))) == len(tables)
        self.done = step * self.plan.layers + layer

    def run(self, step: Step, cancel_after: int | None) -> None:
        self.announce(step, EMBEDDING)
        for layer in range(self.plan.layers):
            if cancel_after is None or layer <= cancel_after:
                self.announce(step, layer)
            elif (step.number, layer) not in self.sets:
                return
            self.compute(step.number, layer)


@settings(max_examples=50, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    slots=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    staging=st.integers(1, 5),
    lookahead=st.integers(0, 2),
    window=st.integers(0, 2),
    refine=st.booleans(),
    kind=st.sampled_from(("lowrank", "router")),
    hits_first=st.booleans(),
    cancelled=st.integers(0, 3),
)
def test_any_ring_computes_exactly_its_sets(
    random, slots, staging, lookahead, window, refine, kind, hits_first, cancelled
):
    world = World(random, plan(tuple(slots), 12, staging, lookahead, refine, kind), window, hits_first)
    for number, every in enumerate((True, False, False, True, False)):
        world.run(step_of(number, every), cancelled if number == 3 else None)
    while events := world.events():
        events[0]()
    assert world.bench.cache.idle
    assert world.outstanding == []
    stats = world.bench.cache.stats()
    assert stats["decode_misses"] + stats["stream_misses"] == world.bundles_read
    assert stats["resident"] <= stats["slots"]
