"""The file of a run's timeline: Chrome's trace-event format as JSON, which Perfetto opens (ui.perfetto.dev).

One process with a track for each worker. Compute's track has a slice for every token, and within it the
token's parts; flows lead from where a layer was announced through predictor and cache to its FFN. Reads
overlap, and are asynchronous events. Counters tell the bytes read so far and the units that have a slot.
Times are microseconds since the first stamp. `otherData` holds what `run.py timeline` needs besides.

A name that ends in .gz is compressed.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from pipeline.ring.messages import EMBEDDING
from pipeline.tracing.slices import DECIDE, FFN, PREDICT, RingSlices, Slice, TokenTime
from storage.errors import UsageError, reason

FORMAT = 1  # of otherData
TRACKS = ("compute", "predictor", "cache", "prefetcher")  # thread ids from 1, in the order of display
TID = {name: number for number, name in enumerate(TRACKS, 1)}
GZIP_LEVEL = 4

Event = dict[str, Any]


def write(file: Path, rings: Sequence[RingSlices], about: Mapping[str, Any]) -> None:
    """Write the trace of rings that ran one after the other. Raises UsageError for a file that cannot be."""
    try:
        with _opened(file, "wb") as stream:
            text = TextIOWrapper(stream, encoding="utf-8")
            text.write('{"displayTimeUnit":"ms","otherData":')
            text.write(json.dumps({"format": FORMAT, **about}))
            text.write(',"traceEvents":[\n')
            for number, event in enumerate(events(rings)):
                text.write(",\n" if number else "")
                text.write(json.dumps(event, separators=(",", ":")))
            text.write("\n]}\n")
            text.flush()
            text.detach()
    except OSError as error:
        raise UsageError(f"the timeline {file} cannot be written: {reason(error)}") from error


def load(file: Path) -> dict[str, Any]:
    """A trace that `write` wrote. Raises UsageError for any other file."""
    try:
        with _opened(file, "rb") as stream:
            trace = json.load(stream)
    except (OSError, EOFError) as error:
        what = reason(error) if isinstance(error, OSError) else "it is cut short"
        raise UsageError(f"the timeline {file} cannot be read: {what}") from error
    except ValueError as error:
        raise UsageError(f"{file} is no timeline: it is not JSON") from error
    about = trace.get("otherData") if isinstance(trace, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT or "traceEvents" not in trace:
        raise UsageError(f"{file} is no timeline of flashring: --timeline FILE writes one")
    return cast(dict[str, Any], trace)


def _opened(file: Path, mode: str) -> AbstractContextManager[IO[bytes]]:
    if file.suffix == ".gz":
        return cast(AbstractContextManager[IO[bytes]], gzip.open(file, mode, compresslevel=GZIP_LEVEL))
    return cast(AbstractContextManager[IO[bytes]], file.open(mode))


def events(rings: Sequence[RingSlices]) -> Iterator[Event]:
    """All events; each ring is a process of the trace."""
    starts = [one.start for ring in rings for one in (*ring.compute, *ring.others)]
    zero = min(starts, default=0)
    numbers = itertools.count(1)  # of reads and flows: Perfetto takes equal ones of two processes for one
    for pid, ring in enumerate(rings, 1):
        yield from _names(pid)
        yield from _of_ring(pid, ring, zero, numbers)


def _names(pid: int) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": f"ring {pid}"}}
    for name, tid in TID.items():
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _of_ring(pid: int, ring: RingSlices, zero: int, numbers: Iterator[int]) -> Iterator[Event]:
    def at(nanoseconds: int) -> float:
        return (nanoseconds - zero) / 1e3

    for token in ring.tokens:
        yield _complete(pid, TID["compute"], _token_name(token), "token", at, token.start, token.end) | {
            "args": {"run": token.run, "token": token.token}
        }
    for one in (*ring.compute, *ring.others):
        if one.track == "prefetcher" and one.name != "submit":
            yield from _asynchronous(pid, next(numbers), one, at)
        else:
            kind = "wait" if one.wait else "work"
            name = f"wait: {one.name}" if one.wait else one.name
            yield _complete(pid, TID[one.track], name, kind, at, one.start, one.end) | {"args": _args(one)}
    yield from _flows(pid, ring, at, numbers)
    yield from _counters(pid, ring.others, at)


def _token_name(token: TokenTime) -> str:
    return "prompt" if token.prompt else f"token {token.token}"


def _args(one: Slice) -> dict[str, Any]:
    args: dict[str, Any] = {"run": one.run, "token": one.token, "step": one.step}
    if one.layer != EMBEDDING:
        args["layer"] = one.layer
    if one.part:
        args["part"] = one.part
    if one.track == "prefetcher" and one.name != "submit":
        args["bytes"] = one.value
    elif one.name == DECIDE and not one.wait:
        args["slots"] = one.value
    return args


def _complete(pid: int, tid: int, name: str, category: str, at: Any, start: int, end: int) -> Event:
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category,
        "ts": at(start), "dur": (end - start) / 1e3,
    }  # fmt: skip


def _asynchronous(pid: int, number: int, one: Slice, at: Any) -> Iterator[Event]:
    """A read: they overlap, so they are no slices of the prefetcher's track."""
    both = {"pid": pid, "tid": TID["prefetcher"], "name": one.name, "cat": "read", "id": number}
    yield {"ph": "b", **both, "ts": at(one.start), "args": _args(one)}
    yield {"ph": "e", **both, "ts": at(one.end)}


def _flows(pid: int, ring: RingSlices, at: Any, numbers: Iterator[int]) -> Iterator[Event]:
    """Announced, predicted, decided, computed: one arrow for each layer that went all this way.

    A flow is bound to the slice around its time, so the announcement needs none of its own.
    """
    found: dict[tuple[str, int, int], Slice] = {}
    for one in (*ring.others, *ring.compute):
        if one.name in (PREDICT, DECIDE, FFN) and not one.wait:
            found.setdefault((one.name, one.step, one.layer), one)
    for (name, step, layer), predicted in found.items():
        announced = ring.announced.get((step, predicted.value))
        decided, computed = found.get((DECIDE, step, layer)), found.get((FFN, step, layer))
        if name != PREDICT or announced is None or decided is None or computed is None:
            continue
        number = next(numbers)
        way = (
            ("s", "compute", announced),
            ("t", "predictor", predicted.start),
            ("t", "cache", decided.start),
            ("f", "compute", computed.start),
        )
        for phase, track, moment in way:
            event = {
                "ph": phase, "pid": pid, "tid": TID[track], "id": number, "cat": "layer",
                "name": f"layer {layer}", "ts": at(moment),
                "args": {"layer": layer, "token": predicted.token},
            }  # fmt: skip
            yield {**event, "bp": "e"} if phase == "f" else event


def _counters(pid: int, others: Iterable[Slice], at: Any) -> Iterator[Event]:
    """Bytes read so far, and units with a slot in all layers, whenever they change."""
    changes: list[tuple[int, str, int, int]] = [
        (one.end, "bytes read", one.layer, one.value)
        for one in others
        if one.track == "prefetcher" and one.name != "submit"
    ]
    changes += [(one.end, "slots", one.layer, one.value) for one in others if one.track == "cache"]
    total, held = 0, dict[int, int]()
    for moment, name, layer, value in sorted(changes):
        if name == "slots":
            held[layer] = value
            count = sum(held.values())
        else:
            total += value
            count = total
        unit = "units" if name == "slots" else "bytes"
        yield {"ph": "C", "pid": pid, "tid": 0, "name": name, "ts": at(moment), "args": {unit: count}}
