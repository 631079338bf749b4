"""The cache of all layers: messages in, messages and table rows out. Pure; PROTOCOL.md is its text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.ring.counters import of_layer
from pipeline.ring.messages import LayerPart, NeuronsPredicted, PartDone, ReadBundles
from pipeline.ring.plan import LARGE, Plan
from pipeline.ring.segments import ID, SLOT
from workers.cache.policy import NOTHING, Ids, Policy, WindowThenOldest
from workers.cache.residency import NOWHERE, Residency
from workers.cache.staging import Staging

Table = npt.NDArray[np.int32]
Instruction = LayerPart | ReadBundles

COUNTED = ("decode_hits", "decode_misses", "decode_wasted", "stream_hits", "stream_misses", "staged")


@dataclass(slots=True)
class _Layer:
    """One layer and the (step, layer) that it is in."""

    residency: Residency
    first_slot: int
    tick: int = -1
    settled: bool = True  # this tick's set has been answered
    guessed: int = 0  # bundles that this tick's guess asked for: part 1
    hits: int = 0  # decode, since the start
    misses: int = 0


class LayerCache:
    """Answers predictions with reads and schedules."""

    def __init__(
        self,
        plan: Plan,
        wanted: Table,
        reads: Table,
        policy: Callable[[int], Policy] | None = None,
        hits_first: bool = True,
    ) -> None:
        """The tables are [layers, 2, most units]; `policy` makes one layer's, by default without window.

        Unless `hits_first`, a token's hits are kept back until all of its misses have been read.
        """
        make = policy or (lambda layer: WindowThenOldest(plan.units[layer], 0))
        self._plan = plan
        self._hits_first = hits_first
        self._wanted, self._reads = wanted, reads
        self._every = np.arange(plan.most_units)
        self._staging = Staging()
        self._first_staging = [plan.first_staging_slot(half) for half in range(2)]
        self._done = -1
        self._counts: Counter[str] = Counter()
        self.decode_seconds = 0.0  # of answering decode's predictions; its caller measures
        self.layers = [
            _Layer(Residency(plan.units[layer], plan.slots[layer], make(layer)), plan.first_slot(layer))
            for layer in range(plan.layers)
        ]

    # -- messages ---------------------------------------------------------------------------------

    def handle(self, message: NeuronsPredicted | PartDone, ids: Table | Ids = NOTHING) -> list[Instruction]:
        """What to send, in this order; the tables are written by then.

        `ids` are those that the prediction's row lists. They are not kept beyond the call.
        """
        if isinstance(message, PartDone):
            return list(self._staging.done(message))
        self._done = max(self._done, message.done)
        if message.guess and self._is_late(message):
            return []
        layer = self._turn(message)
        assert ids.size == message.listed, "ids are missing"
        listed = ids.astype(np.intp)
        if message.every and message.keep is None:
            listed = self._all(message.layer)
        if message.guess:
            assert not message.doubtful, "a guess that doubts"
            return self._guess(layer, message, listed)
        assert not layer.settled, f"layer {message.layer} has two sets in step {message.step.number}"
        layer.settled = True
        if message.keep is not None:
            every = self._all(message.layer) if message.every else listed
            return self._prompt(layer, message, every, listed[: message.keep])
        return self._set(layer, message, self._settled(layer, message, listed))

    def _is_late(self, guess: NeuronsPredicted) -> bool:
        """Whether the guess comes after its set, which a mixture's compute sends by another way."""
        layer, tick = self.layers[guess.layer], self._tick(guess)
        return layer.tick > tick or (layer.tick == tick and layer.settled)

    def _tick(self, message: NeuronsPredicted) -> int:
        """The message's place in the order of all steps' layers."""
        return message.step.number * self._plan.layers + message.layer

    def _all(self, layer: int) -> Ids:
        """Every neuron of a layer."""
        return self._every[: self._plan.units[layer]]

    def _settled(self, layer: _Layer, message: NeuronsPredicted, listed: Ids) -> Ids:
        """The set that a prediction comes to, as neurons are resident or not."""
        certain, doubtful = listed[: message.certain], listed[message.certain :]
        if message.every:
            return listed
        if self._plan.forecast.prefer:
            certain = layer.residency.prefer(certain)
        return layer.residency.settle(certain, doubtful) if doubtful.size else certain

    def _turn(self, message: NeuronsPredicted) -> _Layer:
        """The message's layer, moved on to the message's step."""
        layer = self.layers[message.layer]
        step, tick = message.step.number, self._tick(message)
        if layer.tick != tick:
            assert tick > layer.tick, f"step {step} of layer {message.layer} is over"
            assert layer.tick <= self._done, f"layer {message.layer} is still in use"
            layer.residency.begin(step)
            layer.tick, layer.settled, layer.guessed = tick, False, 0
        return layer

    # -- guesses ----------------------------------------------------------------------------------

    def _guess(self, layer: _Layer, message: NeuronsPredicted, ids: Ids) -> list[Instruction]:
        """Start to read what is missing, as far as there are slots."""
        assert not layer.guessed, "two guesses for one layer"
        residency = layer.residency
        missing = ids[residency.lease(ids) == NOWHERE]
        missing = missing[: self._plan.forecast.guesses]
        admitted = missing[: residency.make_room(missing.size)]
        if not admitted.size:
            return []
        residency.admit(admitted)
        residency.use(admitted, message.step.number)
        layer.guessed = admitted.size
        self._count(layer, message, hits=0, misses=admitted.size)
        return [self._read(layer, message, 1, 0, admitted, residency.slot_of[admitted] + layer.first_slot)]

    # -- sets -------------------------------------------------------------------------------------

    def _set(self, layer: _Layer, message: NeuronsPredicted, ids: Ids) -> list[Instruction]:
        """Hits, guessed neurons, and slots for the missing ones while there are any."""
        residency = layer.residency
        slots = residency.lease(ids)
        missing = slots == NOWHERE
        guessed = residency.in_flight.take(slots) if layer.guessed else None
        places = missing.nonzero()[0]
        if places.size:
            absent = ids.take(places)
            residency.admit(absent[: residency.make_room(absent.size)])
            slots[places] = residency.slot_of.take(absent)
        residency.use(ids, message.step.number)
        return self._answer(layer, message, ids, slots, missing, guessed)

    def _prompt(self, layer: _Layer, message: NeuronsPredicted, wanted: Ids, keep: Ids) -> list[Instruction]:
        """All of `wanted`; those of `keep` may evict others of them, which are then read through staging.

        What is left of free slots takes the others, in the order of `wanted`: a cold cache fills at once.
        """
        residency = layer.residency
        residency.lease(wanted)
        kept = keep[residency.slot_of.take(keep) == NOWHERE]
        if residency.make_room(kept.size) < kept.size:  # without what is wanted
            residency.release()
            residency.lease(keep)
        kept = kept[: residency.make_room(kept.size)]
        others = np.ones(self._plan.units[message.layer], np.bool_)
        others[keep] = False
        others &= residency.slot_of == NOWHERE
        filling = wanted[others.take(wanted)][: residency.free - kept.size]
        ids = np.sort(wanted)
        slots = residency.lease(ids)
        missing = slots == NOWHERE
        guessed = residency.in_flight.take(slots) if layer.guessed else None
        residency.admit(np.sort(np.concatenate((kept, filling))))
        slots[missing] = residency.slot_of.take(ids[missing])
        residency.use(keep, message.step.number)
        return self._answer(layer, message, ids, slots, missing, guessed)

    def _answer(
        self,
        layer: _Layer,
        message: NeuronsPredicted,
        ids: Ids,
        slots: Ids,
        missing: npt.NDArray[np.bool_],
        guessed: npt.NDArray[np.bool_] | None,
    ) -> list[Instruction]:
        """Write the tables of a set and schedule its parts.

        All arrays are [wanted neurons]: `slots` of the layer, NOWHERE for what has to be staged;
        `missing` has to be read now; `guessed` is being read already, where the layer had a guess.
        """
        misses = int(np.count_nonzero(missing))
        wanted_guesses = 0 if guessed is None else int(np.count_nonzero(guessed))
        self._count(layer, message, hits=ids.size - misses - wanted_guesses, misses=misses)
        if not message.step.every:
            self._counts["decode_wasted"] += layer.guessed - wanted_guesses
        staged = (slots == NOWHERE).nonzero()[0] if misses and slots.min() == NOWHERE else NOTHING
        slots += layer.first_slot
        read_by_groups = misses > 0 and message.step.every and self._plan.forecast.routed
        if staged.size or read_by_groups:
            return self._groups(layer, message, ids, slots, missing, staged)
        if not (self._hits_first or message.step.every) and (misses or layer.guessed):
            return self._together(layer, message, ids, slots, missing)
        return self._parts(layer, message, ids, slots, missing, guessed, misses)

    def _together(
        self,
        layer: _Layer,
        message: NeuronsPredicted,
        ids: Ids,
        slots: Ids,
        missing: npt.NDArray[np.bool_],
    ) -> list[Instruction]:
        """Everything fits, and is one part: with the misses, or else with the guess's."""
        self._wanted[message.layer, ID, : ids.size] = ids
        self._wanted[message.layer, SLOT, : ids.size] = slots
        before = (0, 0) if layer.guessed and missing.any() else (0,)
        closes = (False,) * len(before) + (True,)
        schedule = _schedule(message, (*before, ids.size), closes, staged=False)
        if not missing.any():
            return [schedule]
        absent = ids[missing], slots[missing]
        return [self._read(layer, message, len(before), layer.guessed, *absent), schedule]

    def _parts(
        self,
        layer: _Layer,
        message: NeuronsPredicted,
        ids: Ids,
        slots: Ids,
        missing: npt.NDArray[np.bool_],
        guessed: npt.NDArray[np.bool_] | None,
        misses: int,
    ) -> list[Instruction]:
        """Everything fits: hits, then the guess's, then the misses, large ones of a token one by one."""
        later = [] if guessed is None else [guessed.nonzero()[0]]
        instructions: list[Instruction] = []
        if misses:
            absent = missing.nonzero()[0]
            alone = self._plan.stride >= LARGE and not message.every
            at = layer.guessed
            for some in np.split(absent, absent.size) if alone else (absent,):
                later.append(some)
                read = self._read(layer, message, len(later), at, ids.take(some), slots.take(some))
                instructions.append(read)
                at += read.count
        if later:
            hits = (~missing if guessed is None else ~(missing | guessed)).nonzero()[0]
            order = np.concatenate((hits, *later))
            counts = (hits.size, *(some.size for some in later))
            ids, slots = ids.take(order), slots.take(order)
        else:
            counts = (ids.size,)
        self._wanted[message.layer, ID, : ids.size] = ids
        self._wanted[message.layer, SLOT, : ids.size] = slots
        closes = (False,) * len(later) + (True,)
        return [*instructions, _schedule(message, counts, closes, staged=False)]

    def _groups(
        self,
        layer: _Layer,
        message: NeuronsPredicted,
        ids: Ids,
        slots: Ids,
        missing: npt.NDArray[np.bool_],
        staged: npt.NDArray[np.intp],
    ) -> list[Instruction]:
        """More than fits: groups by ascending id, each with at most one half of staged neurons.

        `staged` are the places in `ids` of what has no slot. A prompt's experts come by groups also where
        all fit, and each reads no more than a half: it is computed while the next ones are read.
        """
        half = self._plan.staging
        limited = missing.nonzero()[0] if self._plan.forecast.routed else staged
        without = np.zeros(ids.size, np.bool_)
        without[staged] = True
        cuts = [0, *limited[half::half].tolist(), ids.size]
        for number, start in enumerate(range(0, limited.size, half)):
            some = limited[start : start + half]
            some = some[without.take(some)]
            first = self._first_staging[self._staging.next_half(number)]
            slots[some] = np.arange(first, first + some.size)
        self._counts["staged"] += staged.size
        self._wanted[message.layer, ID, : ids.size] = ids
        self._wanted[message.layer, SLOT, : ids.size] = slots
        before = (0, 0) if layer.guessed else (0,)
        at, groups = layer.guessed, []
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            asked = missing[start:end]
            read = (ids[start:end][asked], slots[start:end][asked])
            groups.append(self._read(layer, message, len(before) + number, at, *read))
            at += read[0].size
        counts = (*before, *(end - start for start, end in itertools.pairwise(cuts)))
        closes = (False,) * len(before) + (True,) * len(groups)
        reads = self._staging.enrol(groups) if staged.size else groups
        return [*reads, _schedule(message, counts, closes, staged=staged.size > 0)]

    # -- tables and counters ------------------------------------------------------------------------

    def _read(
        self, layer: _Layer, message: NeuronsPredicted, part: int, start: int, ids: Ids, slots: Ids
    ) -> ReadBundles:
        """Write rows of the layer's read table."""
        table = self._reads[message.layer]
        assert start + ids.size <= self._plan.units[message.layer], "a layer reads more than it has"
        table[ID, start : start + ids.size] = ids
        table[SLOT, start : start + ids.size] = slots
        return ReadBundles(
            message.run, message.step, message.layer, part, start, int(ids.size), message.guess
        )

    def _count(self, layer: _Layer, message: NeuronsPredicted, hits: int, misses: int) -> None:
        kind = "stream" if message.step.every else "decode"
        self._counts[f"{kind}_hits"] += hits
        self._counts[f"{kind}_misses"] += misses
        if not message.step.every:
            layer.hits += hits
            layer.misses += misses

    def stats(self) -> dict[str, float]:
        """Counters since the start, in neurons; `layer.N.hits` and `.misses` are decode's."""
        values = {name: float(self._counts[name]) for name in COUNTED}
        values["decode_seconds"] = self.decode_seconds
        values["evictions"] = float(sum(layer.residency.evictions for layer in self.layers))
        values["dropped"] = float(sum(layer.residency.dropped for layer in self.layers))
        values["slots"] = float(self._plan.total_slots)
        values["resident"] = float(sum(layer.residency.resident for layer in self.layers))
        for number, layer in enumerate(self.layers):
            values[of_layer(number, "hits")] = float(layer.hits)
            values[of_layer(number, "misses")] = float(layer.misses)
        return values

    def validate(self) -> None:
        """Assert every layer's invariants."""
        for layer in self.layers:
            layer.residency.validate()

    @property
    def idle(self) -> bool:
        """Whether no staging half is in use or awaited."""
        return self._staging.idle


def _schedule(
    message: NeuronsPredicted, counts: tuple[int, ...], closes: tuple[bool, ...], staged: bool
) -> LayerPart:
    return LayerPart(message.run, message.step.number, message.layer, 0, counts, closes, staged)
