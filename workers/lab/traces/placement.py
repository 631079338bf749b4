"""What an order or a bundling does to reads, by replaying a trace with the ring's own residency.

How long they would take is told by the rates that this machine's disk has at their sizes, many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table

from workers.cache.residency import NOWHERE, Residency
from workers.lab.offline.replay import Make
from workers.lab.offline.trace import Trace
from workers.lab.traces.order import friends

Reading = Callable[[float], float]  # bytes a second of random reads of so many bytes


@dataclass(frozen=True, slots=True)
class Reads:
    """Totals per token, over all layers."""

    name: str
    requests: float  # after adjacent bundles were joined
    bundles: float
    bytes: float
    seconds: float  # of the disk
    redundant: float  # share of the bytes that were in DRAM already, or a gap

    @property
    def run(self) -> float:
        """Bundles a request."""
        return self.bundles / self.requests if self.requests else 0.0


def ordered(
    name: str,
    trace: Trace,
    slots: int,
    make: Make,
    order: npt.NDArray[np.int32] | None,
    reading: Reading,
    gap: int = 0,
) -> Reads:
    """Misses as requests; `order` `[layers, d_ff]`, None: by id; up to `gap` bundles between join, too."""
    bundles = skipped = 0
    lengths = np.zeros(trace.d_ff + 1, np.int64)  # requests of so many bundles, gaps among them
    for layer in range(trace.layers):
        place = np.arange(trace.d_ff) if order is None else np.argsort(order[layer])
        residency = Residency(trace.d_ff, slots, make(layer, slots))
        for step, mask in enumerate(trace.masks(trace.used, layer)):
            absent = np.sort(place[_miss(residency, step, np.flatnonzero(mask))])
            if absent.size:
                between = np.diff(absent) - 1
                joined = between <= gap
                bundles += absent.size
                skipped += int(between[joined].sum())
                first = absent[np.concatenate(([True], ~joined))]
                last = absent[np.concatenate((~joined, [True]))]
                lengths += np.bincount(last - first + 1, minlength=lengths.size)
    sizes = trace.stride * np.arange(lengths.size)
    return Reads(
        name,
        int(lengths.sum()) / trace.tokens,
        bundles / trace.tokens,
        (bundles + skipped) * trace.stride / trace.tokens,
        sum(lengths[n] * sizes[n] / reading(sizes[n]) for n in np.flatnonzero(lengths)) / trace.tokens,
        skipped / max(1, bundles + skipped),
    )


def _miss(residency: Residency, step: int, wanted: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """One token: the neurons to read, which have then been given slots."""
    residency.begin(step)
    absent: npt.NDArray[np.intp] = wanted[residency.lease(wanted) == NOWHERE]
    residency.admit(absent[: residency.make_room(absent.size)])
    residency.use(wanted, step)
    return absent


def befriended(name: str, trace: Trace, earlier: Trace, slots: int, make: Make, reading: Reading) -> Reads:
    """Every bundle holds a neuron and its closest friend, as the paper tried (§3.2)."""
    bundles = redundant = 0
    for layer in range(trace.layers):
        friend = friends(earlier.masks(earlier.used, layer))
        residency = Residency(trace.d_ff, slots, make(layer, slots))
        for step, mask in enumerate(trace.masks(trace.used, layer)):
            residency.begin(step)
            wanted = np.flatnonzero(mask)
            absent = wanted[residency.lease(wanted) == NOWHERE]
            brought: set[int] = set()
            for neuron in absent.tolist():
                if neuron in brought:
                    continue  # it came as an earlier one's friend
                bundles += 1
                other = int(friend[neuron])
                redundant += int(other in brought or residency.slot_of[other] != NOWHERE)
                brought |= {neuron, other}
            residency.admit(absent[: residency.make_room(absent.size)])
            residency.use(wanted, step)
            others = np.array(sorted(brought), np.intp)
            others = others[residency.slot_of[others] == NOWHERE]
            residency.admit(others[: residency.make_room(others.size)])
    count, size = bundles / trace.tokens, 2 * trace.stride
    return Reads(
        name, count, count, count * size, count * size / reading(size), redundant / max(1, 2 * bundles)
    )


def table(found: Sequence[Reads]) -> Table:
    made = Table(
        "placement",
        "requests a token",
        "bundles a request",
        "KB a request",
        "KB a token",
        "disk, ms a token",
        "redundant",
    )
    for one in found:
        made.add_row(
            one.name,
            f"{one.requests:,.1f}",
            f"{one.run:.2f}",
            f"{one.bytes / 1e3 / one.requests if one.requests else 0.0:.2f}",
            f"{one.bytes / 1e3:,.0f}",
            f"{one.seconds * 1e3:.2f}",
            f"{one.redundant:.1%}",
        )
    return made
