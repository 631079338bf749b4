"""The whole bench: parts in turn, results written after each, so that an interrupted run keeps its own."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.directories import check_writable
from pipeline.status import waiting
from storage import files
from storage.store import Store
from workers.lab.bench import ablation, conditions, curve, disk, peers, plots, prefill, roofline, table
from workers.lab.bench.ceilings import Around, Ceilings
from workers.lab.bench.children import ChildFailed
from workers.lab.bench.disk import Throughput
from workers.lab.bench.job import BenchJob
from workers.lab.bench.prefill import Prefill
from workers.lab.bench.roofline import Roofline
from workers.lab.bench.rows import NAIVE, Row
from workers.lab.bench.series import Series

FORMAT = 1  # of results.json
RESULTS, REPORT = "results.json", "results.md"
CURVE_POINTS, QUICK_POINTS = 6, 2
CLIFF = "Less than the first budget is refused."


@dataclass(slots=True)
class Bench:
    """What has been measured so far, and where it goes."""

    job: BenchJob
    out: Path
    parts: Sequence[str]
    draw: bool
    conditions: dict[str, Any]
    around: Around
    beside: dict[str, tuple[BenchJob, Around]] = field(default_factory=dict)  # rows of other stores
    started: float = field(default_factory=time.monotonic)
    rows: dict[str, Row] = field(default_factory=dict)  # of the ablation
    curve: list[Row] = field(default_factory=list)
    tries: list[Throughput] = field(default_factory=list)
    ceilings: dict[str, list[Ceilings]] = field(default_factory=dict)  # row → around each run
    bandwidth: dict[str, float] = field(default_factory=dict)
    roofs: list[Roofline] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    fio: list[Throughput] = field(default_factory=list)  # the prefetcher's and fio's tries in turn
    peers: dict[str, Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)  # of what is not a row

    def write(self) -> None:
        """Results, report and plots of everything so far."""
        results = self.results()
        for name, text in (
            (RESULTS, json.dumps(results, indent=2) + "\n"),
            (REPORT, table.document(results, self.sections())),
        ):
            files.write_whole(self.out / name, text.encode())
        if self.draw:
            self._draw(results["title"])

    def results(self) -> dict[str, Any]:
        store, job = self.job.store, self.job
        synthetic = is_synthetic(store.manifest.parameters)
        measured = [row for row in (*self.rows.values(), *self.curve, *self.peers.values()) if not row.error]
        cold = [row for row in measured if not row.cold]
        free = [row for row in measured if not row.limited]
        short = [row for row in measured if row.failed]
        return {
            "format": FORMAT,
            "title": f"{store.manifest.name}{' (synthetic)' if synthetic else ''}, {job.budget}",
            "model": store.manifest.name,
            "synthetic": synthetic,
            "architecture": store.architecture.to_json(),
            "command": shlex.join(["run.py", *sys.argv[1:]]),
            "seconds": time.monotonic() - self.started,
            "conditions": {**self.conditions, "load_average_at_end": list(os.getloadavg())},
            "caveats": [
                *conditions.caveats(self.conditions),
                *([f"Not from a cold page cache: {_names(cold)}."] if cold else []),
                *([f"Without a memory cgroup: {_names(free)}."] if free else []),
                *(f"{row.name}: {len(row.run_ms)} of {job.repeats} runs: {row.failed}." for row in short),
                *(f"{failure}." for failure in dict.fromkeys(self.failures)),
            ],
            "budget": job.budget,
            "prompt_tokens": job.prompt_tokens,
            "tokens": job.count,
            "repeats": job.repeats,
            "ablation": [row.to_json() for row in self.rows.values()],
            "curve": [row.to_json() for row in self.curve],
            "disk": [one.to_json() for one in self.tries],
            "memory_bandwidth": self.bandwidth,
            "roofline": [roof.to_json() for roof in self.roofs],
            "prefill": [one.to_json() for one in self.prefills],
            "fio": [one.to_json() for one in self.fio],
            "peers": [row.to_json() for row in self.peers.values()],
        }

    def sections(self) -> dict[str, str]:
        """Title → Markdown of what has been measured."""
        found = {}
        rows, others = list(self.rows.values()), list(self.peers.values())
        if rows:
            found["What each technique brings"] = table.ablation(rows, ablation.techniques(self.job))
        if rows and self.job.store.architecture.family == "opt":
            found["The paper's figures"] = table.PAPER
            if self.job.device != "cpu":
                found["The paper's devices"] = table.PAPER_DEVICES
        if others:
            found["Peers"] = table.ablation(others, ())
        if rows:
            found["How many times faster"] = table.speedups(rows, others, self.roofs)
        if self.roofs:
            found["Roofline"] = table.roofline(self.roofs)
        if self.prefills:
            found["Prefill"] = table.prefill(self.prefills)
        if self.fio:
            found["The prefetcher beside fio"] = table.beside_fio(self.fio)
        if self.curve:
            found["Memory against latency"] = f"{table.curve(self.curve)}\n\n{CLIFF}"
        if self.tries:
            found["This disk, GB/s of random reads"] = table.disk(self.tries)
        return found

    def of(self, name: str) -> tuple[BenchJob, Around]:
        """Whose row this is, and the ceilings of that store."""
        return self.beside.get(name, (self.job, self.around))

    def _draw(self, title: str) -> None:
        rows = [*self.rows.values(), *self.peers.values()]
        if any(not row.error for row in rows):
            plots.ablation(self.out / "ablation.png", rows, title)
        if any(not row.error for row in self.curve):
            plots.curve(self.out / "curve.png", self.curve, title)
        if self.tries:
            plots.disk(self.out / "disk.png", self.tries, title)


def measure(
    job: BenchJob,
    out: Path,
    *,
    parts: Sequence[str],
    draw: bool,
    only: Sequence[str],
    strict: bool,
    interpreters: Mapping[str, Path],
    checkpoint: Path | None,
    beside: Mapping[str, Store],
    say: Callable[[str], None],
) -> Bench:
    """Measure the ablation's rows (`only` those named, if any) and the peers in turn, then the other parts.

    The rows of stores `beside`, each under its name, take turns with those of the job's.

    Writes into `out` after each row and part. What fails is told, and stops nothing else. Raises UsageError
    for a row that there is not, and for an `out` that cannot be written.
    """
    own = ablation.series(job, only) if "ablation" in parts else []
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / RESULTS)
    others = peers.series(job, interpreters, checkpoint, out) if checkpoint is not None else []
    bench = Bench(job, out, parts, draw, conditions.take(job.store.path), Around(job))
    for label, store in beside.items() if own else ():
        other = job.beside(store, label)
        added = ablation.series(other, only)
        own += added
        bench.beside |= dict.fromkeys((series.name for series in added), (other, Around(other)))
    for caveat in conditions.caveats(bench.conditions):
        say(caveat)
    _take_turns(bench, own, others)
    if own and strict:
        _half_memory(bench)
    for part, take in _PARTS.items():
        if part in parts:
            say(f"== {part}")
            with _told(bench, part), waiting(f"measuring {part}"):
                take(bench)
            bench.write()
    return bench


def _take_turns(bench: Bench, own: Sequence[Series], others: Sequence[Series]) -> None:
    """Each row once, the peers' after ours, and so on: what disturbs the machine for minutes disturbs all."""
    repeats = bench.job.repeats if own or others else 0
    for number in range(1, repeats + 1):
        bench.job.say(f"== run {number} of {repeats}")
        for series in own:
            _measure(bench, series, bench.rows)
        for series in others:
            _measure(bench, series, bench.peers)


def _half_memory(bench: Bench) -> None:
    series = ablation.strict(bench.job, list(bench.rows.values()))
    if series is not None:
        for _ in range(bench.job.repeats):
            _measure(bench, series, bench.rows)


def _measure(bench: Bench, series: Series, rows: dict[str, Row]) -> None:
    bench.job.say(f"measuring {series.name}")
    with waiting(f"measuring {series.name}"):
        _measure_once(bench, series, rows)


def _measure_once(bench: Bench, series: Series, rows: dict[str, Row]) -> None:
    job, _ = bench.of(series.name)
    roofed = "roofline" in bench.parts and _has_roof(job, series)
    before = _ceilings(bench, series) if roofed else None
    row = rows[series.name] = series.again()
    for around in (bench.around, *(other for _, other in bench.beside.values())):
        around.ran()
    if series.error:
        bench.job.say(f"{series.name} could not be measured: {series.error}")
    elif before is not None and (after := _ceilings(bench, series)) is not None:
        bench.ceilings.setdefault(row.name, []).append(before.between(after))
    bench.write()


def _ceilings(bench: Bench, series: Series) -> Ceilings | None:
    """None where they cannot be taken: the row is measured without a roof then."""
    found = None
    with _told(bench, f"the disk's ceiling around {series.name}"):
        found = bench.of(series.name)[1].now(series)
    return found


@contextmanager
def _told(bench: Bench, what: str) -> Iterator[None]:
    """Tell a child's failure and go on: what has been measured stays."""
    try:
        yield
    except ChildFailed as error:
        bench.failures.append(f"{what} could not be measured: {error}")
        bench.job.say(bench.failures[-1])


def _has_roof(job: BenchJob, series: Series) -> bool:
    """Rings with all techniques have one, of a mixture all rings and, but for a quick run, the naive row."""
    if series.name == NAIVE:
        return not job.quick
    return job.mixture or ablation.complete(job, series)


def _curve(bench: Bench) -> None:
    best = ablation.best([row for row in bench.rows.values() if row.name not in bench.beside])
    points = QUICK_POINTS if bench.job.quick else CURVE_POINTS
    bench.curve = curve.measure(bench.job, best.settings if best else {}, points)


def _disk(bench: Bench) -> None:
    for one in disk.sweep(bench.job.store, quick=bench.job.quick):
        bench.tries.append(one)  # one by one: a later one may fail


def _roofline(bench: Bench) -> None:
    """Of the rows whose ceilings have been taken around each run."""
    job = bench.job
    bench.bandwidth = roofline.bandwidth(job)
    whole = [row for row in bench.rows.values() if not row.error]
    bench.roofs = [
        roofline.measure(bench.of(row.name)[0], row, bench.bandwidth, bench.ceilings[row.name])
        for row in whole
        if len(bench.ceilings.get(row.name, ())) == len(row.run_ms) and row.bytes_per_token > 0
    ]
    naive = next((roof for roof in bench.roofs if roof.row == NAIVE), None)
    sequential = naive.disk_idle if naive else bench.around.now(job.naive()).idle
    bench.prefills = [
        prefill.measure(bench.of(row.name)[0], row, sequential, bench.bandwidth)
        for row in whole
        if ablation.complete(bench.of(row.name)[0], row)
    ]
    if not job.quick:
        with _told(bench, "the prefetcher beside fio"):
            bench.fio = disk.beside_fio(job.store, job.store.layout.stride)


_PARTS: dict[str, Callable[[Bench], None]] = {"curve": _curve, "disk": _disk, "roofline": _roofline}
PARTS = ("ablation", *_PARTS)  # the first one in turn with the peers, the others after it


def is_synthetic(parameters: Mapping[str, Any]) -> bool:
    """Whether a store's manifest says that its weights are made up."""
    return bool(parameters.get("synthetic"))


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows)
