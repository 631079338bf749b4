"""A mixture's trace through slots that are not the same number in every layer: divided by need, or one pool.

The ring gives every layer its own slots: a pool, in which layers take from each other, is here to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.planner.need import Needs
from workers.cache.frequency import RecentlyFrequent
from workers.cache.policy import Policy, WindowThenOldest
from workers.cache.residency import Residency
from workers.lab.offline.policies import LeastStale, PooledBelady
from workers.lab.offline.replay import Outcome, turn
from workers.lab.offline.trace import Trace


def pooled(trace: Trace, half_lives: Sequence[float]) -> dict[str, Callable[[], Policy]]:
    """Every policy of one pool by name."""
    layers, every = trace.layers, trace.layers * trace.d_ff
    made: dict[str, Callable[[], Policy]] = {"pool, LRU": lambda: WindowThenOldest(every, 0)}
    for half_life in half_lives:  # in tokens, of which each is a turn of every layer
        turns = half_life * layers
        made[f"pool, LRFU {half_life:g}"] = lambda h=turns: RecentlyFrequent(every, 0, h)  # type: ignore[misc]
    made["pool, least-stale"] = lambda: LeastStale(layers, trace.d_ff)
    made["pool, Belady"] = lambda: PooledBelady(
        np.stack([trace.masks(trace.used, layer) for layer in range(layers)])
    )
    return made


def replay(trace: Trace, slots: int, policy: Policy, warm_up: int = 0) -> Outcome:
    """All layers in turn, in one pool of `slots`; the first `warm_up` tokens are not counted."""
    residency = Residency(trace.layers * trace.d_ff, slots, policy)
    masks = [trace.masks(trace.used, layer) for layer in range(trace.layers)]
    totals = np.zeros(3, np.int64)
    for token in range(trace.tokens):
        for layer, mask in enumerate(masks):
            wanted = np.flatnonzero(mask[token]) + layer * trace.d_ff
            found = turn(residency, token * trace.layers + layer, wanted, None)
            if token >= warm_up:
                totals += found
    hits, reads, wasted = totals.tolist()
    return Outcome(hits, reads, wasted, trace.tokens - warm_up)


def needs(trace: Trace, experts: Sequence[int], store: str = "") -> Needs:
    """What slots bring in each layer, of so many `experts`; `store` is the identity of the weights."""
    masks = [trace.masks(trace.used, layer) for layer in range(trace.layers)]
    hits = (hits_by_slots(mask[:, :count]) for mask, count in zip(masks, experts, strict=True))
    return Needs(store, sum(int(mask.sum()) for mask in masks), tuple(tuple(one.tolist()) for one in hits))


def hits_by_slots(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """LRU's hits with 0, 1 … as many slots as units, `[units + 1]`, of one layer's `[tokens, units]`.

    A unit is a hit with more slots than units were used after it (Mattson's stack distance); of those of
    one token the lower id counts as used later.
    """
    tokens, units = masks.shape
    counts = np.zeros(units + 1, np.int64)
    last = np.full(units, -1, np.int64)
    for token in range(tokens):
        order = np.argsort(-last, kind="stable")
        place = np.empty(units, np.intp)
        place[order] = np.arange(units)
        known = masks[token] & (last >= 0)
        np.add.at(counts, place[known] + 1, 1)
        last[masks[token]] = token
    return counts.cumsum()
