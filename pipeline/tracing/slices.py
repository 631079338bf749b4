"""What each worker of a ring did, and when, from its stamps.

Compute's slices leave no gap between two tokens: they are the parts that a token's time consists of. A wait
is cut by what the awaited layer was going through meanwhile. All times are nanoseconds of one clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pipeline.ring import timeline
from pipeline.ring.messages import EMBEDDING
from pipeline.ring.timeline import (
    ADDED,
    ANNOUNCED,
    ANSWERED,
    ASKED,
    BEGAN,
    BEGUN,
    CHOOSING,
    COMPLETE,
    COMPUTED,
    EMBEDDED,
    FORESEEN,
    GUESS_ASKED,
    GUESS_READ,
    HEARD,
    KNOWN,
    LOOKED,
    NEEDED,
    PREDICTED,
    PROMPTED,
    READ,
    RESTING,
    TOLD,
    Stamps,
)

# Parts of a token's time in compute, and what a wait is for.
EMBED, CHOOSE, ATTENTION, FFN, AUDIT, HEAD = "embed", "choose", "attention", "ffn", "audit", "head"
PREDICT, DECIDE, FETCH, HAND_OVER = "predict", "decide", "read", "hand over"
WORK = (EMBED, ATTENTION, CHOOSE, FFN, AUDIT, HEAD)
WAITS = (PREDICT, DECIDE, FETCH, HAND_OVER)
WAIT, GUESS = "wait", "guess"


@dataclass(frozen=True, slots=True)
class Slice:
    """A worker did one thing from `start` to `end`."""

    track: str  # the worker
    name: str
    start: int
    end: int
    step: int
    layer: int  # EMBEDDING where it is none's
    token: int | None = None  # of the answer; None: none's
    run: int = 0  # the answer, over the ring's life
    part: int = 0
    value: int = 0  # a read's bytes, units with a slot at a decision, a prediction's source
    wait: bool = False


@dataclass(frozen=True, slots=True)
class TokenTime:
    """From one token to the next, or from a prompt's beginning to its first token."""

    run: int
    token: int
    start: int
    end: int
    prompt: bool


@dataclass(slots=True)
class RingSlices:
    """Of one ring."""

    compute: list[Slice] = field(default_factory=list)
    tokens: list[TokenTime] = field(default_factory=list)
    others: list[Slice] = field(default_factory=list)  # of predictor, cache and prefetcher
    announced: dict[tuple[int, int], int] = field(default_factory=dict)  # step and source → when


def slices_of(ring: Mapping[str, Stamps], layers: int) -> RingSlices:
    """Of a ring whose model has so many layers."""
    streams = {name: _rows(stamps) for name, stamps in ring.items()}
    found = RingSlices()
    found.others = [
        *_predictions(streams.get("predictor", [])),
        *_decisions(streams.get("cache", [])),
        *_reads(streams.get("prefetcher", [])),
    ]
    compute = streams.get("compute", [])
    found.announced = {(row.step, row.layer): row.at for row in compute if row.event == ANNOUNCED}
    _compute(compute, layers, _chains(found.others), found)
    # Behind a token, its head's slice still bears the step before.
    steps = {one.step: (one.run, one.token) for one in found.compute if one.name != HEAD}
    found.others = [
        replace(one, run=run, token=token)
        for one in found.others
        for run, token in [steps.get(one.step, (0, None))]
    ]
    return found


@dataclass(frozen=True, slots=True)
class _Row:
    """A stamp."""

    event: int
    step: int
    layer: int
    part: int
    value: int
    at: int


def _rows(stamps: Stamps) -> list[_Row]:
    return [_Row(*row) for row in stamps[stamps[:, timeline.AT].argsort(kind="stable")].tolist()]


# -- the other workers ----------------------------------------------------------------------------


def _predictions(rows: Sequence[_Row]) -> Iterator[Slice]:
    """Each answer of the predictor, from what it heard or from its answer before."""
    since, source = 0, EMBEDDING
    for row in rows:
        if row.event == HEARD:
            source = row.layer
        else:
            name = PREDICT if row.event == PREDICTED else GUESS
            yield Slice("predictor", name, since, row.at, row.step, row.layer, value=source)
        since = row.at


def _decisions(rows: Sequence[_Row]) -> Iterator[Slice]:
    since = 0
    for row in rows:
        if row.event == FORESEEN:
            since = row.at
        elif row.event == ANSWERED:
            yield Slice("cache", DECIDE, since, row.at, row.step, row.layer, value=row.value)


def _reads(rows: Sequence[_Row]) -> Iterator[Slice]:
    """Submissions, which follow one another, and the reads of parts, which overlap."""
    asked: dict[tuple[int, int, int], int] = {}
    for row in rows:
        key = row.step, row.layer, row.part
        if row.event in (ASKED, GUESS_ASKED):
            asked[key] = row.at
        elif row.event == BEGUN and key in asked:
            yield Slice("prefetcher", "submit", asked[key], row.at, *key[:2], part=row.part)
        elif row.event in (READ, GUESS_READ) and key in asked:
            name = FETCH if row.event == READ else GUESS
            yield Slice("prefetcher", name, asked[key], row.at, *key[:2], part=row.part, value=row.value)


# -- compute --------------------------------------------------------------------------------------


class _Chain:
    """What a layer of one step went through, to tell what a wait for it was for."""

    def __init__(self) -> None:
        self.before: list[tuple[int, int, str]] = []  # until the schedule was there
        self.reads: dict[int, tuple[int, int]] = {}  # by part

    def cut(self, start: int, end: int, part: int) -> Iterator[tuple[int, int, str]]:
        """The wait from `start` to `end` for a part: consecutive intervals, each with what it is for."""
        spans = list(self.before)
        if part in self.reads:
            spans.append((*self.reads[part], FETCH))
        at = start
        for first, last, what in sorted(spans):
            begin, stop = max(first, at), min(last, end)
            if begin >= stop:
                continue
            if begin > at:
                yield at, begin, HAND_OVER
            yield begin, stop, what
            at = stop
        if at < end:
            yield at, end, HAND_OVER


def _chains(others: Sequence[Slice]) -> dict[tuple[int, int], _Chain]:
    found: dict[tuple[int, int], _Chain] = defaultdict(_Chain)
    for one in others:
        chain = found[one.step, one.layer]
        if one.track == "prefetcher" and one.name != "submit":
            chain.reads[one.part] = one.start, one.end
        elif one.name in (PREDICT, DECIDE):
            chain.before.append((one.start, one.end, one.name))
    return found


def _compute(
    rows: Sequence[_Row], layers: int, chains: Mapping[tuple[int, int], _Chain], found: RingSlices
) -> None:
    """Fill in compute's slices and the tokens' times."""
    run = began = last_told = 0
    runs = 0
    for (row, then), token in zip(pairwise(rows), _owners(rows), strict=True):
        if row.event == PROMPTED:
            run, began, runs = runs, row.at, runs + 1
        if row.event == TOLD:
            last_told = row.at
        if then.event == TOLD:
            first = then.value == 0
            found.tokens.append(TokenTime(run, then.value, began if first else last_told, then.at, first))
        what = _doing(row, then, layers)
        if not what:
            continue
        one = Slice("compute", what, row.at, then.at, row.step, _layer(row, what), token, run)
        if what == WAIT:
            part = then.part if then.event == COMPLETE else 0
            chain = chains.get((row.step, row.layer), _Chain())
            for begin, end, why in chain.cut(row.at, then.at, part):
                found.compute.append(replace(one, name=why, start=begin, end=end, part=part, wait=True))
        elif found.compute and _goes_on(found.compute[-1], one):
            found.compute[-1] = replace(found.compute[-1], end=one.end)
        else:
            found.compute.append(one)


def _goes_on(before: Slice, one: Slice) -> bool:
    """Whether a slice is only the rest of the one before."""
    same = (before.name, before.wait, before.layer, before.token, before.run, before.end)
    return same == (one.name, False, one.layer, one.token, one.run, one.start)


def _owners(rows: Sequence[_Row]) -> list[int | None]:
    """The token that each interval between two stamps leads to; None behind an answer's last token."""
    found: list[int | None] = []
    owner: int | None = None
    for row, then in reversed(list(pairwise(rows))):
        if then.event == TOLD:
            owner = then.value
        found.append(owner)
        if row.event == PROMPTED:
            owner = None
    return found[::-1]


def _layer(row: _Row, what: str) -> int:
    """Whose part it is that begins with a stamp."""
    if what in (EMBED, HEAD):
        return EMBEDDING
    if what == ATTENTION and (row.layer == EMBEDDING or row.event in (COMPUTED, LOOKED)):
        return row.layer + 1
    return row.layer


# What compute does from a stamp on, where that does not depend on the next one.
_BEGINS = {
    PROMPTED: EMBED,
    BEGAN: EMBED,
    EMBEDDED: ATTENTION,
    ANNOUNCED: ATTENTION,
    CHOOSING: CHOOSE,
    KNOWN: FFN,
    COMPLETE: FFN,
    RESTING: FFN,
}


def _doing(row: _Row, then: _Row, layers: int) -> str:
    """What compute does between two of its stamps; empty: nothing, it has no request."""
    if row.event in _BEGINS:
        return _BEGINS[row.event]
    if row.event == NEEDED:
        return WAIT if then.event in (KNOWN, COMPLETE) else FFN
    if row.event == ADDED:
        return WAIT if then.event == COMPLETE else FFN
    if row.event == COMPUTED and then.event == LOOKED:
        return AUDIT
    if row.event in (COMPUTED, LOOKED):
        return HEAD if row.layer == layers - 1 else ATTENTION
    return "" if then.event == PROMPTED else HEAD
