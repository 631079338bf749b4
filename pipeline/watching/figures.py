"""A ring at work in figures, from two looks at its workers' counters. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.ring.audit import ACTIVE, FOUND
from pipeline.ring.counters import KEPT, NOW_LAYER, NOW_WAITS, PROMPT_LAYERS, of_layer
from pipeline.status import remaining

Stats = Mapping[str, Mapping[str, float]]  # by worker and name


@dataclass(frozen=True, slots=True)
class Look:
    """The ring at one moment."""

    at: float  # seconds
    stats: Stats
    tokens: int  # that the running answer has so far


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """What one worker does."""

    name: str
    busy: float  # share of the time since the look before
    doing: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Between two looks; of a prompt's, or an answer's, whole so far where it is said."""

    workers: tuple[WorkerLine, ...]
    tokens: int  # so far
    tokens_per_second: float
    prompt: str  # how far the prompt is; empty: it is done
    read_bytes: float  # so far
    read_rate: float  # bytes a second
    ceiling: float  # bytes a second that this disk delivers; 0: not known
    hit_rate: float | None  # of decode, so far; None: nothing was looked up
    hits_by_layer: tuple[float | None, ...]
    memory: int  # bytes, the most so far
    budget: int | None
    recall: float | None  # None: nothing was audited


def figures(
    before: Look,
    now: Look,
    start: Stats,
    *,
    layers: int,
    began: float,
    ceiling: float = 0.0,
    memory: int = 0,
    budget: int | None = None,
) -> Figures:
    """`start`: the counters when the running prompt began, at `began` seconds."""
    seconds = max(1e-6, now.at - before.at)

    def grown(worker: str, name: str, since: Stats) -> float:
        return now.stats.get(worker, {}).get(name, 0.0) - since.get(worker, {}).get(name, 0.0)

    def share(worker: str, *names: str) -> float:
        spent = sum(grown(worker, name, before.stats) for name in names)
        return min(1.0, max(0.0, spent / seconds))

    def rate_of(hits: float, misses: float) -> float | None:
        return hits / (hits + misses) if hits + misses > 0 else None

    compute, prefetcher = now.stats.get("compute", {}), now.stats.get("prefetcher", {})
    done = grown("compute", PROMPT_LAYERS, start)
    kept = grown("compute", KEPT, start)
    active = grown("compute", ACTIVE, start)
    by_layer = tuple(
        rate_of(
            grown("cache", of_layer(layer, "hits"), start), grown("cache", of_layer(layer, "misses"), start)
        )
        for layer in range(layers)
    )
    reading = prefetcher.get("in_flight", 0.0)
    return Figures(
        workers=(
            WorkerLine("predictor", share("predictor", "seconds"), "predicts what layers need"),
            WorkerLine("cache", share("cache", "decode_seconds"), "decides what to read"),
            WorkerLine("prefetcher", share("prefetcher", "busy_seconds"), _reading(prefetcher, reading)),
            WorkerLine(
                "compute", 1.0 - share("compute", "waiting_seconds", "prefill_waiting_seconds"), _at(compute)
            ),
        ),
        tokens=now.tokens,
        tokens_per_second=max(0, now.tokens - before.tokens) / seconds,
        prompt="" if now.tokens else remaining(done, layers, now.at - began),
        read_bytes=grown("prefetcher", "decode_bytes", start) + grown("prefetcher", "stream_bytes", start),
        read_rate=sum(
            max(0.0, grown("prefetcher", name, before.stats)) for name in ("decode_bytes", "stream_bytes")
        )
        / seconds,
        ceiling=ceiling,
        hit_rate=rate_of(grown("cache", "decode_hits", start) + kept, grown("cache", "decode_misses", start)),
        hits_by_layer=by_layer,
        memory=memory,
        budget=budget,
        recall=grown("compute", FOUND, start) / active if active > 0 else None,
    )


def _reading(prefetcher: Mapping[str, float], in_flight: float) -> str:
    if not in_flight:
        return "waits for something to read"
    waiting = int(prefetcher.get("backlog", 0.0))
    behind = f", {waiting} behind them" if waiting else ""
    return f"{int(in_flight)} reads under way{behind}"


def _at(compute: Mapping[str, float]) -> str:
    """What compute is at."""
    layer = int(compute.get(NOW_LAYER, 0.0))
    if compute.get(NOW_WAITS, 0.0):
        return f"waits for layer {layer}'s neurons"
    return f"computes, layer {layer}"
