"""The paper's ablation: one technique after another, all measured (the paper computed its baselines)."""

from __future__ import annotations

from pipeline.bench.job import Job
from pipeline.bench.rows import TECHNIQUES, Row

BY_HALVES = {"prefetcher.split": "true"}
IN_LAYER = {"predictor.kind": "lowrank", "predictor.lookahead": "0", "predictor.refine": "false"}

# Name → what it adds to the settings of the row; techniques grow by one from row to row.
SPARSE: tuple[tuple[str, dict[str, str]], ...] = (
    ("+ predictor", {**IN_LAYER, **BY_HALVES, "cache.keep": "false"}),
    ("+ window", {**IN_LAYER, **BY_HALVES}),
    ("+ bundling", IN_LAYER),
    ("+ overlap", {}),
)


def measure(job: Job, *, strict: bool = False) -> list[Row]:
    """Naive, hybrid and, where the store has predictors, each technique; the last row is the default.

    `strict` adds the last row at half of the checkpoint, without the GiB for what runs it.
    """
    rows = [job.naive()]
    if not job.has_predictors:
        rows.append(job.ring("hybrid", ("hybrid",), {"predictor.kind": "all"}, streams=True))
    else:
        dense = {"predictor.kind": "all", "predictor.lookahead": "0"}
        rows.append(job.ring("hybrid", ("hybrid",), dense, streams=True))
        rows += [
            job.ring(name, TECHNIQUES[: number + 2], settings)
            for number, (name, settings) in enumerate(SPARSE)
        ]
        if not job.quick and job.resolved().predictor.lookahead and job.resolved().predictor.refine:
            rows.append(job.ring("overlap without refinement", TECHNIQUES, {"predictor.refine": "false"}))
    if strict:
        techniques = TECHNIQUES if job.has_predictors else ("hybrid",)
        rows.append(job.ring("all techniques at a strict 50 %", techniques, budget="50%"))
    return rows


def complete(rows: list[Row]) -> list[Row]:
    """The rings with all techniques at the full budget; without predictors, the only one there is."""
    rings = [row for row in rows if not row.error and row.name != "naive" and "strict" not in row.name]
    most = max((len(row.techniques) for row in rings), default=0)
    return [row for row in rings if len(row.techniques) == most]


def best(rows: list[Row]) -> Row | None:
    """The quickest ring at the full budget; None when none could be measured."""
    rings = [row for row in rows if not row.error and row.name != "naive" and "strict" not in row.name]
    return min(rings, key=lambda row: row.total_ms, default=None)
