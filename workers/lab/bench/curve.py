"""Memory against latency: from the least that the planner accepts to the whole model."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.console import size
from pipeline.planner import divide
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import Row


def budgets(job: BenchJob, settings: Mapping[str, str], points: int) -> list[int]:
    """Budgets in bytes, evenly spaced from the least to what holds every neuron."""
    config = job.resolved(settings)
    least, most = divide.least(job.store, config).total, divide.most(job.store, config).total
    return [least + (most - least) * point // (points - 1) for point in range(points)]


def measure(job: BenchJob, settings: Mapping[str, str], points: int) -> list[Row]:
    """One row a budget, with the settings of the best row."""
    return [
        job.ring(f"{size(budget)}", settings=settings, budget=f"{budget}B").again()
        for budget in budgets(job, settings, points)
    ]
