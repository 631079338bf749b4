"""A strict reader of Chrome's trace-event format: what Perfetto and chrome://tracing demand of a JSON file.

After "Trace Event Format" (the Catapult project's document): the phases that we use, with the fields that
each must have, their types, and how events of one track must fit together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

# Phase → fields besides ph, pid, tid and name that it must have; and those that it may have.
REQUIRED = {
    "M": {"args"},
    "X": {"ts", "dur", "cat", "args"},
    "b": {"ts", "cat", "id", "args"},
    "e": {"ts", "cat", "id"},
    "s": {"ts", "cat", "id"},
    "t": {"ts", "cat", "id"},
    "f": {"ts", "cat", "id", "bp"},
    "C": {"ts", "args"},
}
ALLOWED = {"s": {"args"}, "t": {"args"}, "f": {"args"}}
METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
ROUNDING = 0.002  # microseconds: times are whole nanoseconds, written as decimals


def problems(trace: Any) -> list[str]:
    """What is wrong with a trace; empty: nothing."""
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        return ["no object with a list traceEvents"]
    found = [] if trace.get("displayTimeUnit") in ("ms", "ns") else ["displayTimeUnit is neither ms nor ns"]
    for number, event in enumerate(trace["traceEvents"]):
        found += [f"event {number}, {event}: {problem}" for problem in _of_event(event)]
    if not found:
        events = trace["traceEvents"]
        found = [*_nesting(events), *_pairs(events), *_flows(events), *_named(events), *_counters(events)]
    return found


def _of_event(event: Any) -> list[str]:
    if not isinstance(event, dict):
        return ["no object"]
    phase = event.get("ph")
    if phase not in REQUIRED:
        return [f"phase {phase!r} is unknown"]
    needed = {"ph", "pid", "tid", "name"} | REQUIRED[phase]
    found = [f"{name} is missing" for name in sorted(needed - set(event))]
    found += [f"{name} is not allowed" for name in sorted(set(event) - needed - ALLOWED.get(phase, set()))]
    return found or [f"{name} is {event[name]!r}" for name in event if not _fits(name, event[name], event)]


def _fits(name: str, value: Any, event: dict[str, Any]) -> bool:
    """Whether a field has a value that it may have."""
    if name in ("pid", "tid"):
        return type(value) is int and value >= 0
    if name in ("ts", "dur"):
        return type(value) in (int, float) and math.isfinite(value) and value >= 0
    if name in ("name", "cat"):
        return isinstance(value, str) and value != ""
    if name == "id":
        return type(value) in (int, str)
    if name == "args":
        return isinstance(value, dict) and _fit(value, event)
    return name == "ph" or value == "e"


def _fit(args: dict[str, Any], event: dict[str, Any]) -> bool:
    """Whether a counter has numbers, and metadata what their name asks for."""
    if event["ph"] == "C":
        return bool(args) and all(type(value) in (int, float) for value in args.values())
    if event["ph"] == "M":
        name, kind = METADATA.get(event["name"], ("", object))
        return isinstance(args.get(name), kind)
    return True


def _slices(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[float, float, str]]]:
    """Complete events by track, each (start, end, name)."""
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            end = event["ts"] + event["dur"]
            tracks[event["pid"], event["tid"]].append((event["ts"], end, event["name"]))
    return tracks


def _nesting(events: list[dict[str, Any]]) -> list[str]:
    """Slices of a track lie within one another, or apart."""
    found = []
    for track, slices in _slices(events).items():
        open_ends: list[tuple[float, str]] = []
        for start, end, name in sorted(slices, key=lambda one: (one[0], -one[1])):
            while open_ends and open_ends[-1][0] <= start + ROUNDING:
                open_ends.pop()
            if open_ends and end > open_ends[-1][0] + ROUNDING:
                found.append(f"track {track}: {name} at {start} reaches beyond {open_ends[-1][1]}")
            open_ends.append((end, name))
    return found


def _pairs(events: list[dict[str, Any]]) -> list[str]:
    """Every asynchronous event begins once and ends once, later."""
    begun: dict[tuple[Any, ...], float] = {}
    found = []
    for event in events:
        if event["ph"] not in "be":
            continue
        key = event["pid"], event["cat"], event["name"], event["id"]
        if event["ph"] == "b":
            if key in begun:
                found.append(f"{key} begins twice")
            begun[key] = event["ts"]
        elif key not in begun:
            found.append(f"{key} ends before it begins")
        elif event["ts"] < begun.pop(key):
            found.append(f"{key} ends too early")
    return found + [f"{key} has no end" for key in begun]


def _flows(events: list[dict[str, Any]]) -> list[str]:
    """Every flow has a start, steps and an end in this order, each within a slice of its track."""
    slices = {track: sorted(some) for track, some in _slices(events).items()}
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["cat"], event["id"]].append(event)  # of all processes together
    found = []
    for key, steps in flows.items():
        phases = "".join(step["ph"] for step in steps)
        if phases != "s" + "t" * (len(phases) - 2) + "f":
            found.append(f"flow {key} is {phases}")
        times = [step["ts"] for step in steps]
        if times != sorted(times):
            found.append(f"flow {key} goes back in time: {times}")
        for step in steps:
            around = slices.get((step["pid"], step["tid"]), [])
            at = step["ts"]
            if not any(start - ROUNDING <= at <= end + ROUNDING for start, end, _ in around):
                found.append(f"flow {key} has a step at {at} in no slice of its track")
    return found


def _named(events: list[dict[str, Any]]) -> list[str]:
    """Every track with slices has a name."""
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    return [f"track {track} has no name" for track in _slices(events) if track not in named]


def _counters(events: list[dict[str, Any]]) -> list[str]:
    """A counter's values come in the order of time."""
    last: dict[tuple[int, str], float] = {}
    found = []
    for event in events:
        if event["ph"] == "C":
            key = event["pid"], event["name"]
            if event["ts"] < last.get(key, 0.0):
                found.append(f"counter {key} goes back in time")
            last[key] = event["ts"]
    return found
