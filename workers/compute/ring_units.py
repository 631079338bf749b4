"""Every layer's units as the ring brings them: announced to the predictor, awaited, added part by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Protocol

import numpy as np

from pipeline.ring.counters import KEPT, NOW_LAYER, NOW_WAITS, PROMPT_LAYERS, of_layer
from pipeline.ring.messages import EMBEDDING, HiddenReady, Message, NeuronsPredicted, PartDone, Step
from pipeline.ring.plan import Plan
from pipeline.ring.segments import ID, SLOT, Segments
from pipeline.ring.timeline import (
    ADDED,
    ANNOUNCED,
    BEGAN,
    CHOOSING,
    COMPLETE,
    COMPUTED,
    EMBEDDED,
    KNOWN,
    LOOKED,
    NEEDED,
    PROMPTED,
    RESTING,
    TOLD,
    Timeline,
)
from workers.compute.audit import Audit
from workers.compute.device import I32, Device, LayerFfn
from workers.compute.look_ahead import LookAhead
from workers.compute.parts import Part, Parts
from workers.compute.seen import HeadStart
from workers.compute.shadow import Choice, Shadow
from workers.predictor.scorer import NOTHING
from workers.routing import Ids, by_use

_PATIENCE = 0.2  # seconds between looks at `stopped` while waiting for parts


class Stopped(Exception):
    """The ring ends while a layer is awaited."""


class Cancelled(Exception):
    """The run was cancelled during its prefill; the ring is drained."""


class Line(Protocol):
    """What compute speaks to: `pipeline.ring.channel.Channel`, outside of tests and the lab."""

    def send(self, to: str, message: Message) -> None:
        """To another worker."""

    def receive(self, inbox: str, timeout: float | None = None) -> Message | None:
        """From others; None: nothing in that time."""


class RingUnits:
    """`blocks.Units` over the ring. `stopped` and the two dictionaries are for any thread.

    Where the plan holds every unit (`Plan.whole`), the first step whose layers have all arrived is the last
    that asks for them: slots are not given to others, so later steps find the units where they are.
    """

    def __init__(
        self,
        device: Device[Any],
        plan: Plan,
        segments: Segments,
        channel: Line,
        audit: Audit | None,
        cancelled: Callable[[int], bool],
        timeline: Timeline,
        shadow: Shadow[Any] | None = None,
        hits_first: bool = True,
    ) -> None:
        """`cancelled(run)` is asked between layers of a prefill; `shadow`: of a forecast that is shadowed.

        `hits_first`: as the cache's configuration has it.
        """
        self._device = device
        self._shadow = shadow
        self._plan = plan
        self._segments = segments
        self._channel = channel
        self._audit = audit
        self._cancelled = cancelled
        self._timeline = timeline
        self._parts = Parts(self._receive)
        self._ahead_of_reads = LookAhead(shadow, plan, segments, channel)
        self._run = 0
        self._step = Step(-1, 0, 0, every=False)
        self._asks = True
        self._rows = 0  # hidden rows of the last announcement
        self._ahead = False  # a mixture's prompt has asked for all of the next layer's experts
        self._done = -1  # tick of the last finished FFN
        self._head_start = HeadStart(plan) if hits_first and plan.forecast.routed else None
        self._chosen: Ids | None = None  # a token's experts of this layer, of which compute told the cache
        self._mark = 0.0  # when the last FFN was finished, or the token embedded
        self._kept: dict[int, tuple[I32, I32]] = {}  # ids and slots of layers that have arrived for good
        self._active_names = [of_layer(index, "active") for index in range(plan.layers)]
        self.stopped = False
        self.seconds: dict[str, float] = defaultdict(float)  # per phase, since the start
        self.counts: dict[str, float] = defaultdict(float)

    def embedding(self, every: bool, count: int) -> None:
        """The next step's `count` tokens are about to be embedded."""
        self._timeline.mark(PROMPTED if every else BEGAN, self._step.number + 1, EMBEDDING, value=count)

    def told(self, index: int) -> None:
        """A token has been sent to the supervisor."""
        self._timeline.mark(TOLD, self._step.number, EMBEDDING, value=index)

    def begin(self, run: int, first: int, every: bool, x: Any) -> None:
        """A step of this run begins with the residual stream x before layer 0, [rows, d_model].

        `first` is the first row's position; `every`: a prefill, which wants every unit.
        """
        self._run = run
        self._step = Step(self._step.number + 1, first, x.shape[0], every)
        if self._audit is not None and not every:
            self._audit.next_token()
        self._asks = len(self._kept) < self._plan.layers
        self._stamp(EMBEDDED, EMBEDDING)
        self.announce(EMBEDDING, x)
        self._mark = time.perf_counter()

    def announce(self, index: int, hidden: Any) -> None:
        """Write the last rows of `hidden` [rows, d_model] and tell the predictor."""
        if not self._asks or self._plan.forecast.low:
            return
        if self._shadow is not None and not self._step.every:
            self._choose(self._shadow, index, hidden)
            return
        self._rows = rows = min(hidden.shape[0], self._plan.hidden_rows)
        self._segments.hidden[index + 1, :rows] = self._device.host(hidden[-rows:])
        if not self._by_choice(index):
            self._tell(index, (), 0)

    def _choose(self, shadow: Shadow[Any], index: int, hidden: Any) -> None:
        """Tell the cache which units of a layer this token wants in full."""
        if index == EMBEDDING:
            return
        whole = index in self._plan.forecast.pinned
        self._stamp(CHOOSING, index)
        started = time.perf_counter()
        choice = Choice(NOTHING, NOTHING) if whole else shadow.choose(index, hidden)
        self._spend("shadow", started)
        self._stamp(ANNOUNCED, index)
        self._want(index, choice.certain, choice.doubtful, whole)

    def _want(self, index: int, certain: Ids, doubtful: Ids, every: bool = False) -> None:
        """Send the cache a token's set of this layer."""
        row, sure, all_listed = self._segments.predicted[index, 0], certain.size, certain.size + doubtful.size
        row[:sure], row[sure:all_listed] = certain, doubtful
        message = NeuronsPredicted(
            self._run, self._step, index, False, every, sure, doubtful.size, None, self._done
        )
        self._channel.send("cache", message)

    def routed(self, index: int, ids: Ids) -> None:
        """Tell the cache which experts a token has, and the predictor, which may guess now."""
        if not self._asks or not self._by_choice(index):
            return
        if self._step.every:
            self._tell(index, *by_use(ids, self._rows))
            return
        self._stamp(ANNOUNCED, index)
        self._want(index, ids[0], NOTHING)
        self._chosen = ids[0]
        ahead = self._plan.forecast.lookahead
        if ahead and index + ahead < self._plan.layers:  # there is something to guess
            self._tell(index, tuple(ids[0].tolist()), ids.shape[1])

    def _by_choice(self, index: int) -> bool:
        """Whether the layer's announcement waits for its experts.

        Where the cache has a say in a token's, they are not known before.
        """
        if index == EMBEDDING or not self._plan.wants_chosen(index):
            return False
        return self._step.every or not self._plan.forecast.settled_by_cache

    def _tell(self, index: int, chosen: tuple[int, ...], kept: int) -> None:
        if not chosen or self._step.every:
            self._stamp(ANNOUNCED, index)
        self._ahead = self._step.every and self._plan.asks_ahead(index, len(chosen))
        message = HiddenReady(self._run, self._step, index, self._rows, self._done, chosen, kept)
        self._channel.send("predictor", message)

    def ffn(self, index: int, ffn_input: Any) -> Any:
        """Add the layer's parts as they arrive, each group summed when it is whole."""
        if not self._step.every:
            self._spend("attention", self._mark)
        if not self._asks:
            self._stamp(NEEDED, index)
            return self._resident(index, self._device.ffn(index, ffn_input))
        if self._plan.forecast.low:
            return self._low(index, ffn_input)
        table, neurons = self._segments.wanted[index], 0
        parts = self._arriving(index)
        if self._settled_by_cache(index):
            parts = self._settle(index, parts)
        rest, waited = self._rest(index), self.seconds["waiting"]
        parts = self._look_ahead(index, ffn_input, parts)
        ffn = self._device.ffn(index, ffn_input)
        self._begin_early(index, ffn)
        self._stamp(NEEDED, index)
        for part in parts:
            if part.number == 0:
                self._stamp(KNOWN, index)
            self._stamp(COMPLETE, index, part.number)
            which = slice(part.start, part.start + part.count)
            neurons += part.count
            started = time.perf_counter()
            self._add(index, part.number, ffn, table[ID, which], table[SLOT, which])
            if part.closes:
                ffn.close()
            if not self._step.every:
                self._spend("ffn", started)
            self._answer(index, part)
            self._stamp(ADDED, index, part.number)
        if self._plan.whole:
            self._kept[index] = table[ID, :neurons].copy(), table[SLOT, :neurons].copy()
        started = time.perf_counter()
        output = ffn.finish() if rest is None else ffn.finish() + rest
        if not self._step.every:
            self._spend("ffn", started)
        self._stamp(COMPUTED, index)
        self._look(index, ffn_input, table[ID, :neurons], output)
        self._finish(index)
        if not self._step.every:
            self._ahead_of_reads.waited(self.seconds["waiting"] - waited)
            self.counts[self._active_names[index]] += ffn.active
            self.counts["active"] += ffn.active
        elif self._cancelled(self._run):
            self._drain(index)
            raise Cancelled
        self._mark = time.perf_counter()
        return output

    def _begin_early(self, index: int, ffn: LayerFfn[Any]) -> None:
        """Compute a token's experts where they were last seen, before the cache has answered."""
        chosen, self._chosen = self._chosen, None
        if chosen is None or self._head_start is None:
            return
        self._stamp(RESTING, index)
        started = time.perf_counter()
        self._head_start.begin(index, chosen, ffn, self._segments.bundles)
        self._spend("ffn", started)

    def _add(self, index: int, number: int, ffn: LayerFfn[Any], ids: I32, slots: I32) -> None:
        """Add what is new in a part."""
        if self._head_start is not None:
            ids, slots = self._head_start.rest(index, number, ids, slots)
            self.counts["mistaken"] = self._head_start.mistaken
        ffn.add(ids, slots, self._segments.bundles)

    def _look(self, index: int, ffn_input: Any, ids: I32, output: Any) -> None:
        """Show the audit a token's layer, if it is that one's turn."""
        if self._audit is None or self._step.every or self._audit.layer != index:
            return
        started = time.perf_counter()
        self._audit.look(self._device.host(ffn_input)[0], ids, self._device.host(output)[0], self.counts)
        self._spend("audit", started)
        self._stamp(LOOKED, index)

    def _settled_by_cache(self, index: int) -> bool:
        """Whether a token's units of this layer are those that come, not those that were chosen."""
        forecast = self._plan.forecast
        return forecast.settled_by_cache and not self._step.every and index not in forecast.pinned

    def _settle(self, index: int, parts: Iterator[Part]) -> Iterator[Part]:
        """Wait for the schedule, after which the table tells the token's units; the same parts."""
        self._stamp(NEEDED, index)
        first = next(parts)
        self._stamp(KNOWN, index)
        ids = np.sort(self._segments.wanted[index, ID, : first.whole]).astype(np.intp)
        if self._shadow is None:
            self._device.settle(index, ids[None])
        else:
            self._shadow.settle(ids)
        return chain((first,), parts)

    def _rest(self, index: int) -> Any:
        """What a token's units add that it does not want in full, while those are read; None: all are."""
        if self._shadow is None or self._step.every or index in self._plan.forecast.pinned:
            return None
        self._stamp(RESTING, index)
        started = time.perf_counter()
        rest = self._shadow.rest()
        self._spend("shadow", started)
        return rest

    def _look_ahead(self, index: int, ffn_input: Any, parts: Iterator[Part]) -> Iterator[Part]:
        """Guess the next layer's units while this one's are read; the same parts."""
        if not self._ahead_of_reads.wanted(index + 1, self._step.every):
            return parts
        first = next(parts)
        if not first.closes:  # others are being read
            started = time.perf_counter()
            self._ahead_of_reads.guess(self._run, self._step, index + 1, ffn_input, self._done)
            self._spend("guesses", started)
        return chain((first,), parts)

    def _low(self, index: int, ffn_input: Any) -> Any:
        """The output of a layer that nothing is read for."""
        assert self._shadow is not None
        self._stamp(NEEDED, index)
        started = time.perf_counter()
        output = self._shadow.ffn(index, ffn_input, self._step.every)
        self._stamp(COMPUTED, index)
        self._finish(index)
        if not self._step.every:
            self._spend("ffn", started)
        elif self._cancelled(self._run):
            raise Cancelled
        self._mark = time.perf_counter()
        return output

    def _resident(self, index: int, ffn: LayerFfn[Any]) -> Any:
        """The output of a layer whose units stay where they are."""
        started = time.perf_counter()
        ffn.add(*self._kept[index], self._segments.bundles)
        ffn.close()
        output = ffn.finish()
        self._stamp(COMPUTED, index)
        self._finish(index)
        if self._step.every:
            if self._cancelled(self._run):
                raise Cancelled
        else:
            self._spend("ffn", started)
            self.counts[self._active_names[index]] += ffn.active
            self.counts["active"] += ffn.active
            self.counts[KEPT] += ffn.active if self._plan.forecast.routed else self._plan.units[index]
        self._mark = time.perf_counter()
        return output

    def _arriving(self, index: int) -> Iterator[Part]:
        """The layer's parts, counting the time spent waiting."""
        phase = "prefill_waiting" if self._step.every else "waiting"
        parts = self._parts.of(self._step.number, index)
        self.counts[NOW_LAYER] = index
        while True:
            started = time.perf_counter()
            self.counts[NOW_WAITS] = 1
            part = next(parts, None)
            self.counts[NOW_WAITS] = 0
            self._spend(phase, started)
            if part is None:
                return
            yield part

    def _answer(self, index: int, part: Part) -> None:
        """Give the staging half back, where the part used one."""
        if part.staged and part.closes:
            self._channel.send("cache", PartDone(self._run, self._step.number, index, part.number))

    def _stamp(self, event: int, index: int, part: int = 0) -> None:
        if self._timeline.on:
            self._timeline.mark(event, self._step.number, index, part)

    def _finish(self, index: int) -> None:
        if self._step.every:
            self.counts[PROMPT_LAYERS] += 1
        self._done = self._step.number * self._plan.layers + index

    def _drain(self, index: int) -> None:
        """Receive, computing nothing, what the announcements up to layer `index` of a prefill will bring."""
        ahead = max(1, self._plan.forecast.lookahead)
        if self._plan.forecast.routed and not self._plan.whole:
            ahead = int(self._ahead)
        last = min(self._plan.layers - 1, index + ahead)
        for later in range(index + 1, last + 1):
            for part in self._arriving(later):
                self._answer(later, part)
            self._finish(later)

    def _receive(self) -> Message:
        while not self.stopped:
            message = self._channel.receive("compute", _PATIENCE)
            if message is not None:
                return message
        raise Stopped

    def _spend(self, phase: str, since: float) -> None:
        self.seconds[phase] += time.perf_counter() - since
