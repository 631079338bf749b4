"""Memory against latency: from the least that the planner accepts to the whole model.

A mixture's first run keeps its sets, and hit rates stand beside the best that any policy could have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from pipeline.console import size
from pipeline.planner import divide
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import Row
from workers.lab.offline.replay import best_after_prefill
from workers.lab.offline.ring import of_ring, sets_file
from workers.lab.offline.trace import Trace


def budgets(job: BenchJob, settings: Mapping[str, str], points: int) -> list[int]:
    """Budgets in bytes, evenly spaced from the least to what holds every neuron."""
    config = job.resolved(settings)
    least, most = divide.least(job.store, config).total, divide.most(job.store, config).total
    return [least + (most - least) * point // (points - 1) for point in range(points)]


def measure(job: BenchJob, settings: Mapping[str, str], points: int) -> list[Row]:
    """One row a budget, with the settings of the best row."""

    def row(budget: int) -> Row:
        return job.ring(f"{size(budget)}", settings=settings, budget=f"{budget}B").again()

    first, *more = budgets(job, settings, points)
    routed = job.resolved(settings).predictor.kind == "router"
    with sets_file() if routed else nullcontext() as file:
        rows = [row(first)]
        trace = of_ring(file, job.store, {}) if file is not None and file.exists() else None
    rows += [row(budget) for budget in more]
    return rows if trace is None else [replace(one, best_hit_rate=best(job, trace, one)) for one in rows]


def best(job: BenchJob, trace: Trace, row: Row) -> float:
    """Belady's hit rate with the row's slots: the same tokens have the same sets in any memory."""
    config = job.resolved(row.settings).replace(memory={"budget": f"{row.budget_bytes}B"})
    return best_after_prefill(trace, divide.plan(job.store, config).plan.slots).hit_rate
