"""The paper's ablation: one technique after another, all measured (the paper computed its baselines)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.quality import FULL_ROWS
from storage.errors import UsageError
from workers.lab.bench.job import BenchJob
from workers.lab.bench.rows import NAIVE, ROUTED, TECHNIQUES, Row
from workers.lab.bench.series import Series

STRICT = "all techniques at a strict 50 %"
EARLY = "early"  # the name of predictors that are asked before attention (train-predictor --early)
BY_HALVES = {"prefetcher.split": "true"}
CACHE_AWARE = {"predictor.cache_aware": "true"}
IN_LAYER = {"predictor.kind": "lowrank", "predictor.lookahead": "0", "predictor.refine": "false"}

# Name → what is still turned off; techniques grow by one from row to row.
SPARSE: tuple[tuple[str, dict[str, str]], ...] = (
    ("+ predictor", {**BY_HALVES, "cache.keep": "false"}),
    ("+ window", BY_HALVES),
    ("+ bundling", {}),
)

# The same of a mixture, whose routers say exactly which experts a token reads.
NO_GUESS = {"predictor.guesses": "0"}
ARRIVED = {"cache.hits_first": "false"}
MIXED: tuple[tuple[str, dict[str, str]], ...] = (
    ("+ router set", {**NO_GUESS, **ARRIVED, "cache.keep": "false"}),
    ("+ slots", {**NO_GUESS, **ARRIVED}),
    ("+ hits first", NO_GUESS),
    ("+ guesses", {}),
)
# Text that depends on what is resident: beside the techniques, not among them.
LOSSY: tuple[tuple[str, dict[str, str]], ...] = (
    ("lossy: prefers resident experts", {"experts.prefer": "0.1"}),
    ("lossy: goes without light experts", {"experts.skip": "0.1"}),
)
# Rows that are no better way to do the same.
BESIDE = (NAIVE, STRICT, *dict(LOSSY))


def series(job: BenchJob, only: Sequence[str] = ()) -> list[Series]:
    """Naive, hybrid and, where the store has predictors, each technique: the table's rows, in its order.

    A store beside another has no naive row: that is of the weights as the first has them.

    `only` those of some names, if any are given; UsageError for a name that the first store has not.

    A model without zeros that has a shadow has a row for each quality.

    There is a row with all techniques for each way to overlap, and, where the predictors can, one that is
    cache-aware. Predictors that must look ahead overlap in every row. A mixture has rows of its
    own, lossy ones among them.
    """
    rows = [] if job.label else [job.naive()]
    rows += _of_mixture(job) if job.mixture else _of_neurons(job)
    known = [row.name.removeprefix(job.label) for row in rows]
    for name in only:
        if name not in known and not job.label:
            raise UsageError(f"this store has no row {name!r}; its rows are {'; '.join(known)}")
    return [row for row, name in zip(rows, known, strict=True) if name in only or not only]


def _of_mixture(job: BenchJob) -> list[Series]:
    rows = [job.ring(name, ROUTED[: number + 1], settings) for number, (name, settings) in enumerate(MIXED)]
    return rows + [job.ring(name, ROUTED, settings) for name, settings in LOSSY]


def _of_neurons(job: BenchJob) -> list[Series]:
    # Nothing overlaps before the row that says so; without predictors there is none but this.
    every = {"predictor.kind": "all", "predictor.cache_aware": "false", "predictor.quality": "exact"}
    if job.has_predictors:
        every["predictor.lookahead"] = "0"
    rows = [job.ring("hybrid", TECHNIQUES[:1], every, streams=True)]
    if job.has_predictors:
        own_layer = job.knows(IN_LAYER)  # otherwise there is no way not to overlap
        apart, also = (IN_LAYER, ()) if own_layer else ({}, TECHNIQUES[-1:])
        for number, (name, settings) in enumerate(SPARSE):
            rows.append(job.ring(name, (*TECHNIQUES[: number + 2], *also), {**apart, **settings}))
        if own_layer:
            rows.append(job.ring("+ overlap", TECHNIQUES, {}))
        for name, settings in overlaps(job):
            rows.append(job.ring(name, TECHNIQUES, settings))
            aware = {**settings, **CACHE_AWARE}
            if job.knows(aware):
                rows.append(job.ring(f"{name}, cache-aware", TECHNIQUES, aware))
    elif job.has_shadow:
        rows += [job.ring(f"quality {word}", TECHNIQUES[:1], settings) for word, settings in qualities(job)]
    return rows


def qualities(job: BenchJob) -> list[tuple[str, dict[str, str]]]:
    """The points of a store with a shadow: the one that was asked for, or all."""
    asked = job.resolved().predictor.quality
    words = FULL_ROWS if asked is None else [asked] if asked in FULL_ROWS else []
    return [(word, {"predictor.quality": word}) for word in words]


def strict(job: BenchJob, rows: list[Row]) -> Series | None:
    """The quickest of the rows with all techniques, in half of the checkpoint; None where there is none.

    A mixture's budget is no share of the checkpoint: it has no such row.
    """
    if job.mixture:
        return None
    quickest = best([row for row in rows if complete(job, row)])
    if quickest is None:
        return None
    return job.ring(STRICT, quickest.techniques, quickest.settings, budget="50%")


def overlaps(job: BenchJob) -> list[tuple[str, dict[str, str]]]:
    """Further ways to overlap that the store's predictors allow."""
    ways = []
    default = job.resolved().predictor
    if not job.quick and default.lookahead and default.refine:
        ways.append(("overlap without refinement", {"predictor.refine": "false"}))
    if job.store.predictors(EARLY).is_file():
        ways.append(("overlap of attention", {"model.predictor": EARLY, "predictor.lookahead": "0"}))
        ways.append(("overlap of attention, guesses", {"model.predictor": EARLY}))
    elif all(layer.parallel for layer in job.store.architecture.layers) and not job.quick:
        ways.append(("overlap of attention", IN_LAYER))  # the FFN's input is attention's, too
    return ways


def techniques(job: BenchJob) -> tuple[str, ...]:
    """Those that the store's rows tell apart."""
    return ROUTED if job.mixture else TECHNIQUES


def complete(job: BenchJob, row: Row | Series) -> bool:
    """Whether a row is a ring with all techniques at the full budget; without predictors there is one."""
    wanted = techniques(job) if job.mixture or job.has_predictors else TECHNIQUES[:1]
    return not row.error and row.techniques == wanted and not row.name.endswith(BESIDE)


def best(rows: list[Row]) -> Row | None:
    """The quickest ring at the full budget that keeps units; None when none could be measured."""
    keeping = [row for row in rows if row.settings.get("cache.keep") != "false"]
    rings = [row for row in keeping if not row.error and not row.name.endswith(BESIDE)]
    return min(rings, key=lambda row: row.total_ms, default=None)
