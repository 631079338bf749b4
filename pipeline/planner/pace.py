"""How long a token takes: the model of time, arithmetic and nothing else.

What one machine does are `Rates`, measured by a probe; what one token needs is its `Work`. Assumptions:

- The kernels of a token wait for the memory: bytes ÷ the rate of the kernel that reads them. Whole
  matrices, dots of scattered rows and sums of scattered rows have rates of their own, by number format. In a
  ring they are slower than the probe, which does one thing again and again: by AMONG.
- A layer has a price of its own, whatever its size: LAUNCHES launches of threads (attention's, the FFN's
  two), and one more for a router; the head has one, and a choice among the vocabulary.
- A layer whose units are asked for waits for HOPS messages. Where sets are foreseen from the layer before
  (`ahead`), only what is longer than a layer. A layer that also reads costs RING hops, whatever is
  foreseen: the ring's other processes need cores that the kernels have. A token costs TOKEN hops.
- Where layers ask, the kernels of all of them are slowed by what the ring's other processes take of the
  cores (BESIDE), and by the predictor's own time, which is waited for or taken from a core that the
  kernels have.
- Missed units cost the disk their bytes ÷ its rate at the size of one read, and one read's latency a
  layer. Where every unit is needed, reads are in order and their destinations stay in the processor's
  caches, which is quicker by what a probe of just that has found.
- Of that time, what a kind of forecast cannot hide is waited for (`exposed`); and while reads are in
  flight, whoever takes them up takes a share of the cores (READER cores) from the kernels. Nothing hides
  more reading than there is computing.
- Where every unit is needed, the longer of computing and reading decides, and a fifth of the shorter is
  added: a layer's parts wait for each other at its beginning and at its end.
- A unit that is wanted is in a slot with a chance that rises with the share of slots: `missed`.
- A prompt computes every weight once for each token, and reads what is not in memory yet; neither hides
  the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

LAUNCHES: Final = 3  # a layer
HOPS: Final = 4  # messages, from a layer's announcement to when its units are known to be there
RING: Final = 8  # the same, in hops, of a layer that reads: four processes take turns on the kernels' cores
GUESS: Final = 2  # and more of them where guesses are read before
TOKEN: Final = 4  # hops of a token: its text is made by another process
AMONG: Final = 1.15  # a kernel's time in a ring ÷ alone; 0.99 to 1.37 in seven shapes that were in memory
BESIDE: Final = 0.4  # of a core, for the ring's other processes, while layers ask for units
READER: Final = 0.4  # of a core, while reads are in flight: 1.7 to 4 µs a read at what a disk can do
SERIAL: Final = 0.2  # of the shorter of reading and computing, where every unit is needed
CHOICE: Final = 8e-9  # seconds a word of the vocabulary: its logit scaled, sorted and drawn
# Waited for, of the time with reads in flight. Sets that are refined: what the guess had not named is read
# when it is needed, and what it named in vain takes its turn before that. Without a guess: all of it.
EXPOSED: Final = {"refined": 0.5, "ahead": 0.25, "own": 1.0}
IN_VAIN: Final = 1.2  # bytes read ÷ bytes missed, where guesses are read
# How a wanted unit's chance to be in a slot rises (`missed`), as OPT's and Qwen3's published localities do.
LOCALITY: Final = 1.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """Bytes a second of one number format."""

    product: float  # of whole matrices
    dots: float  # of scattered rows
    sums: float  # of scattered rows into one


@dataclass(frozen=True, slots=True)
class Rates:
    """One machine's, measured."""

    cores: int
    read: float  # bytes a second of the memory
    kernels: Mapping[str, Kernel]  # by codec
    launch: float  # seconds
    hop: float  # seconds of one message
    scoring: float  # bytes a second of predictors' maps, by one thread
    arithmetic: float  # FLOP a second of a prompt's products
    disk: tuple[tuple[int, float], ...]  # bytes of one random read, bytes a second; ascending
    stream: float  # bytes a second of long reads in order, whose destinations are few and stay in caches
    latency: float  # seconds of one read alone

    def kernel(self, codec: str) -> Kernel:
        """Of a format that was not measured, the slowest of those that were."""
        found = self.kernels.get(codec)
        return found or min(self.kernels.values(), key=lambda one: one.product)

    def reading(self, request: float) -> float:
        """Bytes a second of reads of so many bytes: between two measured sizes by their logarithms."""
        sizes = self.disk
        if request <= sizes[0][0]:  # so many reads a second, however small
            return sizes[0][1] * request / sizes[0][0]
        for (small, low), (large, high) in pairwise(sizes):
            if request <= large:
                part = math.log(request / small) / math.log(large / small)
                return math.exp((1 - part) * math.log(low) + part * math.log(high))
        return sizes[-1][1]


@dataclass(frozen=True, slots=True)
class Work:
    """What one token of a plan needs. Bytes, unless named otherwise; by codec where a kernel reads them."""

    layers: int
    matrices: Mapping[str, float]  # resident ones that every token is multiplied with, the head's apart
    head: Mapping[str, float]
    kept: float  # keys and values
    dots: Mapping[str, float]  # of units' rows that decide
    sums: Mapping[str, float]  # of units' other rows
    vocabulary: int
    launches: int = LAUNCHES  # a layer
    scored: float = 0.0  # of predictors' maps
    forecast: str = "whole"  # whole: nobody is asked; every: all units; else a key of EXPOSED
    flash: float = 0.0  # read
    request: float = 1.0  # of one read
    prompt_flash: float = 0.0  # that the first prompt reads
    prompt_request: float = 1.0
    parameters: float = 0.0  # that a prompt's token is multiplied with
    load: float = 0.0  # resident weights


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one token, by source; they add up."""

    memory: float  # resident matrices, keys and values
    units: float  # rows of the FFN
    layers: float  # launches, messages and predictors: what layers cost whatever their size
    head: float
    disk: float  # waited for, and taken from the cores by readers
    reading: float = field(default=0.0)  # with reads in flight; hidden in part, and so no part of the sum

    @property
    def total(self) -> float:
        return self.memory + self.units + self.layers + self.head + self.disk


def missed(slots: float, wanted: float, locality: float = LOCALITY) -> float:
    """Of wanted units the share that is not in a slot.

    `slots`: for which share of the units there are some; `wanted`: the share that one token wants.
    Without slots nothing is kept, with all of them everything is.
    """
    return max(0.0, 1 - slots) / (1 + locality * _held(slots, wanted))


def locality(slots: float, wanted: float, misses: float) -> float:
    """The inverse of `missed`: the locality that a measured share of misses tells. Infinite without any."""
    if misses <= 0 or slots <= 0:
        return math.inf if misses <= 0 else LOCALITY
    return max(0.0, ((1 - slots) / misses - 1) / _held(slots, wanted))


def _held(slots: float, wanted: float) -> float:
    """How many tokens' sets the slots hold, in effect: of a single one most is gone before it comes again."""
    sets = slots / max(wanted, 1e-9)
    return sets * sets / (1 + sets)


def pace(rates: Rates, work: Work) -> Pace:
    """One token of decode."""
    memory = _product(rates, work.matrices) + work.kept / rates.read
    units = AMONG * sum(size / rates.kernel(name).dots for name, size in work.dots.items())
    units += AMONG * sum(size / rates.kernel(name).sums for name, size in work.sums.items())
    own = work.layers * work.launches * rates.launch
    head = _product(rates, work.head) + rates.launch + CHOICE * work.vocabulary
    if work.forecast != "whole":
        slower = 1 + BESIDE / rates.cores
        memory, units, head = memory * slower, units * slower, head * slower
    computing = memory + units + own + head
    asked = _asked(rates, work, computing - head) + TOKEN * rates.hop
    reading = 0.0
    if work.flash:
        rate = rates.reading(work.request)
        if work.forecast == "every":  # in order, up to the length of one read
            rate *= rates.stream / rates.disk[-1][1]
        reading = work.flash / rate + work.layers * rates.latency
    disk = _waited(rates, work, computing, asked, reading)
    return Pace(memory, units, own + asked, head, disk, reading)


def first_answer(rates: Rates, work: Work, prompt: int, start: float) -> float:
    """Seconds from the command to the first token: the ring's start, the weights' loading, a prompt."""
    loading = work.load / rates.stream
    reading = work.prompt_flash / rates.reading(work.prompt_request)
    return start + loading + reading + 2 * prompt * work.parameters / rates.arithmetic


def _product(rates: Rates, sizes: Mapping[str, float]) -> float:
    return AMONG * sum(size / rates.kernel(name).product for name, size in sizes.items())


def _asked(rates: Rates, work: Work, computing: float) -> float:
    """Seconds a token that layers wait for what they want to be known."""
    if work.forecast == "whole":
        return 0.0
    chain = work.layers * HOPS * rates.hop
    quiet = {"every": 0.0, "ahead": max(0.0, chain - computing)}.get(work.forecast, chain)
    # The share of layers that read: where few units are missed, some layers miss none.
    reads = 1 - math.exp(-work.flash / work.request / work.layers)
    if work.forecast == "every":
        reads = float(work.flash > 0)
    ring = RING + (GUESS if work.forecast == "refined" else 0)
    return work.scored / rates.scoring + reads * work.layers * ring * rates.hop + (1 - reads) * quiet


def _waited(rates: Rates, work: Work, computing: float, asked: float, reading: float) -> float:
    """Seconds a token that reads add to computing, and to asking for them."""
    if not reading:
        return 0.0
    if work.forecast == "every":
        busy = computing + asked
        return max(0.0, reading - busy) + SERIAL * min(reading, busy)
    busy = min(1.0, READER / rates.cores)
    return max((EXPOSED[work.forecast] + busy) * reading, reading - computing)


def worth_more(seconds: Sequence[tuple[int, float]], gain: float = 0.02) -> int:
    """The memory beyond which more does not help: the least that is within `gain` of the quickest.

    `seconds`: bytes of memory and what a token then takes, ascending by bytes.
    """
    best = min(taken for _, taken in seconds)
    return next(size for size, taken in seconds if taken <= best * (1 + gain))
