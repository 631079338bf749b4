"""What a run has shown of a store: how many units a token wants, and how likely they are in a slot.

`run.py` leaves it beside the caches after an answer of many tokens (`$FLASHRING_HOME/seen/STORE.json`),
and the next plan counts with it instead of with published figures.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pipeline import directories
from pipeline.planner import pace
from pipeline.ring.plan import Plan
from pipeline.ring.summary import Summary
from storage.errors import UsageError
from storage.files import write_whole
from storage.store import Store

FEWEST: Final = 32  # tokens that tell something


@dataclass(frozen=True, slots=True)
class Seen:
    """Of decode; shares of the units, and of the neurons."""

    kind: str  # of the forecast
    wanted: float
    active: float
    locality: float  # as `pace.missed` takes it
    tokens: int


def seen(store: Store, plan: Plan) -> Seen | None:
    """What earlier runs have shown of this store under such a forecast; None for nothing that can be read."""
    try:
        found = Seen(**json.loads(_file(store).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, UsageError):
        return None
    return found if found.kind == kind_of(plan) else None


def keep(store: Store, plan: Plan, summary: Summary) -> Seen | None:
    """Leave what this run has shown; None where it shows nothing, or cannot be kept."""
    found = of_run(plan, summary, before=seen(store, plan))
    if found is not None:
        with contextlib.suppress(OSError, UsageError):
            _file(store).parent.mkdir(parents=True, exist_ok=True)
            write_whole(_file(store), json.dumps(asdict(found)).encode())
    return found


def of_run(plan: Plan, summary: Summary, before: Seen | None = None) -> Seen | None:
    """What a run shows; `before`: where it was whole, and read nothing, its locality is the earlier runs'."""
    tokens, total = summary.generated_tokens - 1, sum(plan.units)
    if tokens < FEWEST or plan.forecast.every or plan.forecast.low:
        return None
    wasted = summary.counters["cache"].get("decode_wasted", 0.0)
    wanted = (summary.cache.hits + summary.cache.misses - wasted) / tokens / total
    if not wanted:
        return None
    active = summary.counters["compute"].get("active", 0.0) / tokens / total
    slots = plan.total_slots / total
    known = pace.LOCALITY if before is None else before.locality
    if slots < 1:
        missed = (summary.cache.misses - wasted) / tokens / total / wanted
        told = pace.locality(slots, wanted, missed)
        known = told if math.isfinite(told) else known
    return Seen(kind_of(plan), wanted, min(active, wanted), known, tokens)


def kind_of(plan: Plan) -> str:
    """Forecasts that want the same sets have one word."""
    forecast = plan.forecast
    own = "own" if forecast.from_own_input else "ahead"
    return f"{forecast.kind} {own} {forecast.full_rows:g} {forecast.cache_aware}"


def _file(store: Store) -> Path:
    return directories.home() / "seen" / f"{store.identity}.json"
