"""A trace through the ring's own residency, with any policy, without a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.cache.frequency import RecentlyFrequent
from workers.cache.policy import NOTHING, Ids, Policy, WindowThenOldest
from workers.cache.residency import NOWHERE, Residency
from workers.lab.offline.policies import Belady, FrequencyByAge, PinnedThenOldest
from workers.lab.offline.trace import Trace, pack

LFU = 1e6  # tokens of half-life: longer than any text here
HOT_SHARE = 0.5  # of the slots that a pinned hot set takes
Make = Callable[[int, int], Policy]  # layer, slots → the layer's policy


@dataclass(frozen=True, slots=True)
class Outcome:
    """Totals over layers and tokens, in neurons."""

    hits: int  # wanted and resident
    reads: int  # wanted and absent, or guessed and absent
    wasted: int  # guessed, read, and then not wanted
    tokens: int

    @property
    def wanted(self) -> int:
        return self.hits + self.reads - self.wasted

    @property
    def hit_rate(self) -> float:
        return self.hits / self.wanted if self.wanted else 1.0


def replay(trace: Trace, slots: Sequence[int], make: Make, warm_up: int = 0) -> Outcome:
    """Every layer with its `slots`; the first `warm_up` tokens fill them and are not counted."""
    totals = np.zeros(3, np.int64)
    for layer in range(trace.layers):
        residency = Residency(trace.d_ff, slots[layer], make(layer, slots[layer]))
        wanted = trace.masks(trace.used, layer)
        guessed = None if trace.guessed is None else trace.masks(trace.guessed, layer)
        for step in range(trace.tokens):
            guess = None if guessed is None else np.flatnonzero(guessed[step])
            found = turn(residency, step, np.flatnonzero(wanted[step]), guess)
            if step >= warm_up:
                totals += found
    hits, reads, wasted = totals.tolist()
    return Outcome(hits, reads, wasted, trace.tokens - warm_up)


def turn(
    residency: Residency, step: int, wanted: Ids, guess: Ids | None, doubtful: Ids = NOTHING
) -> tuple[int, int, int]:
    """One token of one layer, as `workers/cache/layers.py` does it: hits, reads, wasted reads.

    What does not fit is read and dropped; `doubtful` ones are wanted where they are resident.
    """
    residency.begin(step)
    guessed = 0
    if guess is not None:
        missing = guess[residency.lease(guess) == NOWHERE]
        admitted = missing[: residency.make_room(missing.size)]
        residency.admit(admitted)
        residency.use(admitted, step)
        guessed = admitted.size
    wanted = residency.settle(wanted, doubtful)
    slots = residency.lease(wanted)
    absent = wanted[slots == NOWHERE]
    useful = int(np.count_nonzero(residency.in_flight[slots]))
    if absent.size:
        residency.admit(absent[: residency.make_room(absent.size)])
    residency.use(wanted, step)
    return wanted.size - absent.size - useful, guessed + absent.size, guessed - useful


def policies(
    trace: Trace, earlier: Trace, windows: Sequence[int], half_lives: Sequence[float]
) -> dict[str, Make]:
    """Every policy by name. `earlier`: another text's trace, which tells the hot neurons."""
    d_ff = trace.d_ff
    made: dict[str, Make] = {"LRU": lambda layer, slots: WindowThenOldest(d_ff, 0)}
    for window in windows:
        made[f"window {window}"] = lambda layer, slots, k=window: WindowThenOldest(d_ff, k)  # type: ignore[misc]
    made["LFU"] = lambda layer, slots: RecentlyFrequent(d_ff, 0, LFU)
    for half_life in half_lives:
        made[f"LRFU {half_life:g}"] = lambda layer, slots, h=half_life: RecentlyFrequent(d_ff, 0, h)  # type: ignore[misc]
    made["LFRU"] = lambda layer, slots: FrequencyByAge(d_ff)
    longest = max(windows)
    made[f"hot set + window {longest}"] = lambda layer, slots: PinnedThenOldest(
        d_ff, longest, hottest(earlier, layer, round(HOT_SHARE * slots))
    )
    made["Belady"] = lambda layer, slots: Belady(trace.masks(trace.used, layer))
    return made


def best_after_prefill(trace: Trace, slots: Sequence[int]) -> Outcome:
    """The most hits that any policy could have of a ring's tokens after a prompt.

    It may have read any expert, and left any of them in slots: those that are needed soonest.
    """
    hits = wanted = 0
    for layer in range(trace.layers):
        masks = trace.masks(trace.used, layer)
        first = np.where(masks.any(axis=0), masks.argmax(axis=0), trace.tokens)
        there = np.zeros((1, trace.d_ff), np.bool_)
        there[0, np.argsort(first, kind="stable")[: slots[layer]]] = True
        masks = np.concatenate((there, masks))
        alone = Trace(trace.d_ff, trace.stride, pack(masks)[None], None, None, {})

        def make(_: int, slots: int, masks: npt.NDArray[np.bool_] = masks) -> Policy:
            return Belady(masks)

        found = replay(alone, slots[layer : layer + 1], make, warm_up=1)
        hits, wanted = hits + found.hits, wanted + found.wanted
    return Outcome(hits, wanted - hits, 0, trace.tokens)


def hottest(trace: Trace, layer: int, count: int) -> npt.NDArray[np.bool_]:
    """`[d_ff]`: the neurons used by most tokens."""
    uses = trace.masks(trace.used, layer).sum(axis=0)
    hot = np.zeros(trace.d_ff, np.bool_)
    hot[np.argsort(-uses, kind="stable")[:count]] = True
    return hot
