"""What a timeline says of a run: the parts of a token's time, its waits by layer, and the disk's part.

Everything is read from the file itself, as `trace.py` wrote it; times are milliseconds, means over the
answers' tokens but the first, or over the prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.tracing.slices import WAITS, WORK
from pipeline.tracing.trace import TID
from storage.errors import UsageError

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the time of a token, or of a prompt, went."""

    count: int  # tokens, or prompts
    ms: float  # of one, from its own two ends
    work_ms: dict[str, float]  # by part
    wait_ms: dict[str, float]  # by what was waited for
    wait_by_layer_ms: tuple[float, ...]

    @property
    def waited_ms(self) -> float:
        return sum(self.wait_ms.values())

    @property
    def sum_ms(self) -> float:
        """Of all parts: what `ms` should be."""
        return sum(self.work_ms.values()) + self.waited_ms


@dataclass(frozen=True, slots=True)
class Disk:
    """Reads of decode."""

    bytes_a_token: float
    busy: float  # share of the time with a read under way
    rate: float  # bytes a second while reading
    ceiling: float  # bytes a second that the disk delivers in large reads; 0: not measured

    @property
    def of_ceiling(self) -> float:
        """Of the bytes that the disk could have delivered in decode's whole time."""
        return self.busy * self.rate / self.ceiling if self.ceiling else 0.0

    @property
    def of_ceiling_while_reading(self) -> float:
        return self.rate / self.ceiling if self.ceiling else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """A whole timeline."""

    about: dict[str, Any]  # model, layers and so on, as recorded
    token: Parts | None  # None: no answer had a second token
    prompt: Parts | None
    disk: Disk | None  # None: decode read nothing

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for name, parts in (("token", self.token), ("prompt", self.prompt)):
            if parts is not None:
                found[name] |= {"sum_ms": parts.sum_ms, "waited_ms": parts.waited_ms}
        if self.disk is not None:
            found["disk"] |= {"of_ceiling": self.disk.of_ceiling}
        return found


def read(trace: Mapping[str, Any]) -> Reading:
    """What `trace.load` has loaded. Raises UsageError for a timeline without any token."""
    about, events = dict(trace["otherData"]), trace["traceEvents"]
    spans = [one for one in events if one.get("cat") == "token"]
    if not spans:
        raise UsageError("the timeline holds no token: the run ended before its first one")
    layers = int(about["layers"])
    compute = [
        one for one in events
        if one["ph"] == "X" and one["tid"] == TID["compute"] and one["cat"] in ("work", "wait")
    ]  # fmt: skip
    decode = [one for one in spans if one["args"]["token"] > 0]
    prompts = [one for one in spans if one["args"]["token"] == 0]
    return Reading(
        about,
        _parts(decode, compute, layers),
        _parts(prompts, compute, layers),
        _disk(decode, events, float(about.get("disk_ceiling", 0.0))),
    )


def _parts(spans: Sequence[Event], compute: Iterable[Event], layers: int) -> Parts | None:
    if not spans:
        return None
    wanted = {_key(one) for one in spans}
    work: dict[str, float] = dict.fromkeys(WORK, 0.0)
    waits: dict[str, float] = dict.fromkeys(WAITS, 0.0)
    by_layer = [0.0] * layers
    for one in compute:
        if _key(one) not in wanted:
            continue
        if one["cat"] == "work":
            work[one["name"]] += one["dur"]
        else:
            waits[one["name"].removeprefix("wait: ")] += one["dur"]
            by_layer[one["args"]["layer"]] += one["dur"]
    scale = 1e-3 / len(spans)
    return Parts(
        count=len(spans),
        ms=scale * sum(one["dur"] for one in spans),
        work_ms={name: scale * value for name, value in work.items()},
        wait_ms={name: scale * value for name, value in waits.items()},
        wait_by_layer_ms=tuple(scale * value for value in by_layer),
    )


def _key(event: Event) -> tuple[int, int, int | None]:
    return event["pid"], event["args"]["run"], event["args"]["token"]


def _disk(spans: Sequence[Event], events: Iterable[Event], ceiling: float) -> Disk | None:
    wanted = {_key(one) for one in spans}
    begun: dict[tuple[int, int], Event] = {}
    reads: dict[int, list[tuple[float, float]]] = defaultdict(list)  # by process
    total = 0
    for one in events:
        if one.get("cat") != "read":
            continue
        if one["ph"] == "b":
            begun[one["pid"], one["id"]] = one
            continue
        start = begun[one["pid"], one["id"]]
        if _key(start) in wanted:
            reads[one["pid"]].append((start["ts"], one["ts"]))
            total += start["args"]["bytes"]
    if not total:
        return None
    seconds = 1e-6 * sum(one["dur"] for one in spans)
    busy = 1e-6 * sum(_covered(some) for some in reads.values())
    return Disk(total / len(spans), min(1.0, busy / seconds), total / max(busy, 1e-9), ceiling)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
