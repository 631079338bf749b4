"""What models would do on this machine: each on its store, or on paper where there is none yet.

`subject` finds a model's sizes without fetching or converting anything; `outlook` divides the memory for
it and asks the model of time (`pace.py`) what that means for a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.config import Config, Values
from pipeline.models.names import configure, presets
from pipeline.models.published import PUBLISHED
from pipeline.models.stores import Source
from pipeline.planner import locality, pace
from pipeline.planner.divide import PlanReport, divide, least_of, most_of
from pipeline.planner.resolve import Resolved, resolve
from pipeline.planner.work import POSITION, Residents, residents, scored_bytes, sparsity_of, work
from storage.convert.opening import open_origin
from storage.convert.paper import of_origin, on_paper
from storage.errors import BudgetError
from storage.manifest import MANIFEST
from storage.store import Store

BITS: Final = (16, 8, 4)
PROMPT: Final = 100  # tokens, of the first answer's delay
START: Final = 2.5  # seconds from the command to a ring of warm kernels, weights not counted
RANK: Final = 42  # d_model ÷ the rank of the predictors that are assumed: 96 of OPT-6.7B's, by `--method svd`
FLOAT16: Final = 2  # bytes
POINTS: Final = 10  # of the curve of memory against time


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in some bits, ready to be planned."""

    name: str
    store: Store
    tensors: Residents
    resolved: Resolved
    made: bool  # its store is there
    assumed: str = ""  # what was assumed of it, for people

    @property
    def bits(self) -> int:
        """Of the FFN's numbers."""
        codec = self.store.layout.unit.codec("down")
        return codec.grouped.bits if codec.grouped else 8 * codec.bytes

    @property
    def codecs(self) -> tuple[str, ...]:
        """That its kernels read."""
        names = {codec for codec, _ in self.tensors.values()}
        units = {row.codec for part in self.store.layout.layers if part.units for row in part.unit.rows}
        return tuple(sorted((names & {"float16", "bfloat16", "q8", "q4", "q4s"}) | units))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a plan will do."""

    subject: Subject
    report: PlanReport
    work: pace.Work
    pace: pace.Pace
    first_seconds: float  # from the command to the first token, for a prompt of PROMPT
    hit_rate: float | None  # None: nothing is looked up
    basis: str  # what the hit rate rests on

    def to_json(self) -> dict[str, Any]:
        report, store = self.report, self.subject.store
        return {
            "model": self.subject.name,
            "bits": self.subject.bits,
            "converted": self.subject.made,
            "memory_bytes": report.total,
            "parts": dict(report.parts),
            "resident_bytes": report.parts.get("resident weights", 0),
            "slots_bytes": report.parts.get("slots", 0),
            "flash_bytes": store.layout.total_bytes,
            "bytes_per_token": self.work.flash,
            "seconds_per_token": self.pace.total,
            "tokens_per_second": 1 / self.pace.total,
            "seconds": asdict(self.pace),
            "first_answer_seconds": self.first_seconds,
            "hit_rate": self.hit_rate,
            "basis": self.basis,
            "assumed": self.subject.assumed,
        }


@dataclass(frozen=True, slots=True)
class Range:
    """A model's memory against its time."""

    least: Outlook
    most: Outlook
    curve: tuple[tuple[int, float], ...]  # bytes, seconds a token
    enough: int  # bytes beyond which more does not help


def subject(
    name: str,
    file: Path | None = None,
    settings: Iterable[str] = (),
    values: Values | None = None,
) -> Subject:
    """The model that a name means, on its store or on paper. Nothing is fetched, and nothing converted.

    Raises as `configure` and `resolve` do, UsageError for a hub's model that is no preset and not here.
    """
    source, config = configure(name, file, settings, values or {})
    found = _store(source)
    made = found is not None
    if found is None:
        shape = PUBLISHED.get(name) or next((PUBLISHED[one] for one in PUBLISHED if one == source.name), None)
        if source.hub_id and shape is not None:
            paper = on_paper(source.name, shape.config, shape.dtype, source.bits)
        else:
            paper = of_origin(open_origin(source.checkpoint(), bits=source.bits), source.name, source.bits)
        found, tensors = paper.store, paper.tensors
    else:
        tensors = dict(residents(found))
    resolved, assumed = _resolved(found, config, made=made)
    return Subject(source.name, found, tensors, resolved, made, assumed)


def _store(source: Source) -> Store | None:
    if source.store is not None:
        return source.open_store()
    path = source.cached_store()
    return Store.open(path) if (path / MANIFEST).is_file() else None


def _resolved(store: Store, config: Config, *, made: bool) -> tuple[Resolved, str]:
    """A ReLU model on paper is taken to have predictors, as it would after `train-predictor`."""
    resolved = resolve(store, config)
    if made or not store.architecture.sparse or not resolved.forecast.every or config.predictor.kind == "all":
        return resolved, ""
    model = store.architecture
    rank = max(16, model.d_model // RANK)
    size = sum(rank * (model.d_model + one.ffn.neurons) * FLOAT16 for one in model.layers)
    lookahead = config.predictor.lookahead
    forecast = replace(
        resolved.forecast, kind="lowrank", lookahead=lookahead, refine=True, pinned=resolved.forecast.pinned
    )
    decided = resolved.config.replace(predictor={"kind": "lowrank", "refine": True})
    said = f"with predictors of rank {rank}, which `run.py train-predictor` makes"
    return Resolved(decided, forecast, size), said


def with_memory(one: Subject, budget: str) -> Subject:
    """The same under another budget, `memory.budget`'s words."""
    config = one.resolved.config.replace(
        memory={"budget": budget}, cache={"share": None, "slots_per_layer": 0}
    )
    return replace(one, resolved=replace(one.resolved, config=config))


def outlook(one: Subject, rates: pace.Rates, position: int = POSITION) -> Outlook:
    """Its plan under its budget, and what a token takes. Raises BudgetError."""
    return of_report(one, divide(one.store, one.resolved), rates, position)


def of_report(one: Subject, report: PlanReport, rates: pace.Rates, position: int = POSITION) -> Outlook:
    """What a plan that was made already will do."""
    config, plan = report.config, report.plan
    seen = locality.seen(one.store, plan) if one.made else None
    sparsity = sparsity_of(one.store, config, plan.forecast, seen)
    scored = 0.0
    if plan.forecast.kind == "lowrank":
        own = one.resolved.predictor_bytes
        scored = float(scored_bytes(one.store, config)) if one.made else own
    needed = work(one.store, one.tensors, config, plan, sparsity, scored, position)
    rate = None
    if not plan.forecast.every and not plan.forecast.low:
        rate = 1.0 - needed.flash / (sparsity.wanted * one.store.layout.total_bytes or 1)
        rate = max(0.0, rate)
    return Outlook(
        one,
        report,
        needed,
        pace.pace(rates, needed),
        pace.first_answer(rates, needed, PROMPT, START),
        rate,
        sparsity.measured or "published figures",
    )


def fitting(rates: pace.Rates, memory: str) -> Iterator[Outlook | str]:
    """Every preset in 16, 8 and 4 bits that fits `memory`; the names of those that do not."""
    for name in presets():
        for bits in BITS if name in PUBLISHED or name == "builtin" else (None,):
            one = with_memory(subject(name, values={"model": {"bits": bits}}), memory)
            try:
                yield outlook(one, rates)
            except BudgetError:
                yield f"{name} in {one.bits} bits"


def span(one: Subject, rates: pace.Rates) -> Range:
    """From the smallest memory that works to all of the model."""
    least, most = least_of(one.store, one.resolved).total, most_of(one.store, one.resolved).total
    sizes = sorted({least + (most - least) * step // POINTS for step in range(POINTS + 1)})
    found = [outlook(with_memory(one, f"{size}B"), rates) for size in sizes]
    curve = tuple((size, each.pace.total) for size, each in zip(sizes, found, strict=True))
    return Range(found[0], found[-1], curve, pace.worth_more(curve))
