"""The bench: its arithmetic on given results, what it refuses, its baseline's mathematics, one quick run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import predictors
import pytest
from checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file

from pipeline.planner import devices
from pipeline.planner.budget import parse_budget
from pipeline.planner.divide import plan
from storage.architecture import layer
from storage.convert import convert
from storage.errors import DiskFull, UsageError
from storage.layout import Layout, neuron
from storage.manifest import PREDICTORS, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.cache.policy import KeepNothing
from workers.cache.residency import NOWHERE, Residency
from workers.lab.bench import __main__ as bench_command
from workers.lab.bench import ablation, bench, ceilings, children, curve, peers, price, rows, table
from workers.lab.bench.ceilings import Around, Ceilings
from workers.lab.bench.children import ChildFailed, Ran
from workers.lab.bench.disk import Throughput
from workers.lab.bench.job import TEXT, BenchJob, make_job, quick_budget
from workers.lab.bench.naive import NaiveModel
from workers.lab.bench.roofline import Roofline, memory_bytes, resident_bytes
from workers.lab.bench.roofline import measure as measure_roof
from workers.lab.bench.rows import TECHNIQUES, Row
from workers.lab.bench.series import Series
from workers.lab.offline.dense import DenseModel
from workers.lab.peers import run_accelerate
from workers.prefetcher.requests import RequestBuilder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "checkpoint", "opt", "float16")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Store:
    made = convert(checkpoint, checkpoint.parent / "store", name="tiny")
    layers = range(len(made.layout.layers))
    maps = predictors.maps(made, "layers", layers) | predictors.maps(made, "inlayer", layers, seed=2)
    predictors.write(made, maps)
    return made


@pytest.fixture
def job(store: Store) -> Iterator[BenchJob]:
    with make_job(
        store,
        text=TEXT,
        prompt_tokens=8,
        count=4,
        budget="50%",
        repeats=1,
        threads=1,
        quick=True,
        settings=(),
        say=lambda _: None,
    ) as made:
        yield made


def ran(token_seconds: list[float], peak: int | None = 9_000, **counters: dict[str, float]) -> Ran:
    """A run of the main job with these counters."""
    workers: dict[str, dict[str, float]] = {"compute": {}, "cache": {}, "prefetcher": {}, "predictor": {}}
    result: dict[str, Any] = {
        "token_seconds": token_seconds,
        "generated_tokens": len(token_seconds) + 1,
        "counters": workers | counters,
        "memory": {"budget_bytes": 10_000, "peak_bytes": 7_000},
        "cache": {"hit_rate": 0.5},
        "seconds": {"prefill": 2.0},
        "flash": {"prefill_bytes": 5_000},
    }
    return Ran(result, peak, limited=peak is not None, cold=True)


def made_of(row: Row) -> Series:
    """A series whose runs make this row."""
    return Series(row.name, lambda: ran([0.001]), lambda _: row, row.techniques)


def results_of(job: BenchJob, out: Path, parts: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What a bench of these parts writes into `out`, and what it says."""
    said: list[str] = []
    bench.measure(
        replace(job, say=said.append),
        out,
        parts=parts,
        draw=False,
        only=(),
        strict=False,
        interpreters={},
        checkpoint=None,
        beside={},
        say=said.append,
    )
    return json.loads((out / "results.json").read_text(encoding="utf-8")), said


def no_luck(*_: Any, **__: Any) -> Any:
    """Stands for whatever runs a child."""
    raise ChildFailed("no luck")


# -- rows -----------------------------------------------------------------------------------------


def test_a_row_has_the_medians_of_its_runs_per_decoded_token():
    def run(factor: float) -> Ran:
        return ran(
            [0.010 * factor, 0.020 * factor],
            compute={
                "attention_seconds": 0.004 * factor,
                "ffn_seconds": 0.002,
                "head_seconds": 0.002,
                "waiting_seconds": 0.006,
                "active": 10,
            },
            cache={"decode_hits": 30, "decode_misses": 14, "decode_wasted": 4, "decode_seconds": 0.002},
            prefetcher={"decode_bytes": 8_000 * factor, "decode_reads": 4, "decode_busy_seconds": 0.008},
            predictor={"decode_seconds": 0.001},
        )

    row = rows.of_rings(
        "+ window", TECHNIQUES[:3], [run(1), run(2), run(3)], unit=neuron("float16", 50), settings={}
    )
    assert row.total_ms == 25  # of 10, 20, 20, 30, 40, 60
    assert row.run_ms == pytest.approx((15, 30, 45))
    assert (row.p10_ms, row.p90_ms) == pytest.approx((10, 40))  # the nearest of six
    assert row.bytes_per_token == 8_000
    assert row.request_bytes == 4_000
    assert row.io_ms == pytest.approx(4)
    assert row.bytes_per_second == pytest.approx(2e6)
    assert row.management_ms == pytest.approx(1)
    assert row.prediction_ms == pytest.approx(0.5)
    assert row.compute_ms == pytest.approx(6)
    assert row.waiting_ms == pytest.approx(3)
    assert row.other_ms == pytest.approx(30 - 6 - 3)
    # 20 neurons predicted a token, 5 of them active: the up rows of all, the down rows of those. Two more
    # were read for a guess that came to nothing, and the kernels do not touch them.
    assert row.touched_bytes == pytest.approx(20 * 100 + 5 * 100)
    assert (row.dram_bytes, row.dram_by, row.limited) == (9_000, "cgroup", True)


def test_a_run_without_a_cgroup_says_so():
    row = rows.of_rings("x", (), [ran([0.1]), ran([0.1], peak=None)], unit=neuron("float16", 50), settings={})
    assert not row.limited
    only = rows.of_rings("x", (), [ran([0.1], peak=None)], unit=neuron("float16", 50), settings={})
    assert (only.dram_bytes, only.dram_by) == (7_000, "proportional set size")


def test_the_best_row_is_a_ring_at_the_full_budget():
    found = [
        Row("naive", total_ms=1),
        Row("hybrid", total_ms=9),
        Row("broken", error="died"),
        Row("+ overlap", total_ms=3),
        Row("all techniques at a strict 50 %", total_ms=2),
    ]
    best = ablation.best(found)
    assert best is not None
    assert best.name == "+ overlap"
    assert ablation.best([found[0], found[2]]) is None


def test_every_way_to_overlap_has_a_row_and_the_quickest_a_strict_one(
    job: BenchJob, monkeypatch: Any
) -> None:
    job = replace(job, quick=False)
    times = {"+ overlap": 30.0, "overlap without refinement": 20.0}
    early_times = {"overlap of attention": 10.0, "overlap of attention, guesses": 15.0}

    def ring(self: BenchJob, name: str, techniques: tuple[str, ...], settings: Any, **other: Any) -> Series:
        total = {**times, **early_times}.get(name, 5.0)
        return made_of(Row(name, techniques, total_ms=total, settings={**settings, **other}))

    monkeypatch.setattr(BenchJob, "ring", ring)
    monkeypatch.setattr(BenchJob, "naive", lambda self: made_of(Row("naive", total_ms=1.0)))
    early = job.store.predictors(ablation.EARLY)

    def measured() -> list[Row]:
        found = [series.again() for series in ablation.series(job)]
        half = ablation.strict(job, found)
        assert half is not None
        return [*found, half.again()]

    names = ["naive", "hybrid", "+ predictor", "+ window", "+ bundling"]
    without = measured()
    assert [row.name for row in without] == [*names, *times, ablation.STRICT]
    assert without[-1].settings["predictor.refine"] == "false"
    early.write_bytes(job.store.predictors("default").read_bytes())
    try:
        found = measured()
    finally:
        early.unlink()
    assert [row.name for row in found] == [*names, *times, *early_times, ablation.STRICT]
    assert [row.name for row in found if ablation.complete(job, row)] == [*times, *early_times]
    assert found[-1].settings["model.predictor"] == ablation.EARLY
    assert found[-1].settings["predictor.lookahead"] == "0"
    assert found[-1].settings["budget"] == "50%"


def test_predictors_with_thresholds_by_residency_have_rows_of_them(job: BenchJob, monkeypatch: Any) -> None:
    tensors = {f"layers.0.{name}": np.ones(1, np.float32) for name in ("bias", "absent")}
    metadata = {"lookahead": "1", "kind": "lowrank"}
    early = job.store.predictors(ablation.EARLY)
    assert not job.knows(ablation.CACHE_AWARE)
    save_file(tensors, early, metadata)
    try:
        assert job.knows({"model.predictor": ablation.EARLY, **ablation.CACHE_AWARE})
        names = [series.name for series in ablation.series(job)]
    finally:
        early.unlink()
    aware = "overlap of attention, guesses, cache-aware"
    assert [name for name in names if name.endswith("cache-aware")] == [aware]


def test_predictors_that_must_look_ahead_overlap_in_every_row(store: Store, job: BenchJob) -> None:
    default = store.predictors("default")
    kept = default.read_bytes()
    predictors.write(store, predictors.maps(store, "layers", range(1, len(store.layout.layers))))
    try:
        found = ablation.series(job)
    finally:
        default.write_bytes(kept)
    assert [series.name for series in found] == ["naive", "hybrid", "+ predictor", "+ window", "+ bundling"]
    assert [series.techniques[-1] for series in found[2:]] == ["overlap"] * 3
    assert found[-1].techniques == TECHNIQUES


def test_only_some_rows(job: BenchJob) -> None:
    chosen = ["+ bundling", "naive"]
    assert [series.name for series in ablation.series(job, chosen)] == ["naive", "+ bundling"]
    with pytest.raises(UsageError, match=r"no row 'all'; its rows are naive; hybrid; \+ predictor"):
        ablation.series(job, ["all"])


def test_a_series_grows_by_a_run_and_keeps_the_good_ones() -> None:
    runs = iter([ran([0.010]), ran([0.030])])

    def run() -> Ran:
        try:
            return next(runs)
        except StopIteration:
            raise ChildFailed("no more") from None

    def row(found: Any) -> Row:
        return rows.of_rings("x", TECHNIQUES, found, unit=neuron("float16", 50), settings={})

    series = Series("x", run, row, TECHNIQUES, 10_000)
    assert [series.again().run_ms for _ in range(2)] == [pytest.approx((10,)), pytest.approx((10, 30))]
    kept = series.again()
    assert kept.run_ms == pytest.approx((10, 30))
    assert (kept.error, kept.failed, kept.to_json()["failed"]) == ("", "no more", "no more")
    runs = iter([ran([0.050])])
    assert series.again() == kept, "what has failed once is not tried again"
    runs = iter(())
    never = Series("x", run, row, TECHNIQUES, 10_000)
    assert never.again() == Row("x", TECHNIQUES, error="no more", budget_bytes=10_000)


def test_a_row_with_a_failed_run_is_reported_with_it(job: BenchJob, tmp_path: Path, monkeypatch: Any) -> None:
    runs = iter([ran([0.010])])

    def run() -> Ran:
        return next(runs, None) or no_luck()

    def row(found: Any) -> Row:
        return rows.of_rings("x", (), found, unit=neuron("float16", 50), settings={})

    monkeypatch.setattr(bench.ablation, "series", lambda job, only: [Series("x", run, row)])
    results, said = results_of(replace(job, repeats=2), tmp_path, ["ablation"])
    assert [one["run_ms"] for one in results["ablation"]] == [pytest.approx([10])]
    assert "x: 1 of 2 runs: no luck." in results["caveats"]
    assert "x could not be measured: no luck" in said


def test_a_part_that_fails_keeps_what_it_has_and_stops_no_other(
    job: BenchJob, tmp_path: Path, monkeypatch: Any
) -> None:
    one = Throughput(512, 1, 8, 1e9, 1.0)
    tries = iter([one])
    monkeypatch.setattr(bench.disk, "try_once", lambda *_, **__: next(tries, None) or no_luck())
    monkeypatch.setattr(bench.disk, "ceiling", lambda *_, **__: one)
    monkeypatch.setattr(bench.curve, "measure", no_luck)
    monkeypatch.setattr(bench.roofline, "bandwidth", lambda _: {"read": 1e9, "matvec": 2e9})
    monkeypatch.setattr(bench.disk.shutil, "which", lambda _: "fio")
    results, said = results_of(replace(job, quick=False), tmp_path, ["curve", "disk", "roofline"])
    assert results["disk"] == [one.to_json()]
    assert results["memory_bandwidth"]["matvec"] == 2e9
    assert results["fio"] == []
    for part in ("curve", "disk", "the prefetcher beside fio"):
        assert f"{part} could not be measured: no luck" in said
        assert f"{part} could not be measured: no luck." in results["caveats"]
    assert not any(sentence.startswith("roofline could not") for sentence in said)


def test_a_row_whose_ceilings_cannot_be_taken_is_kept_without_a_roof(
    job: BenchJob, tmp_path: Path, monkeypatch: Any
) -> None:
    row = Row("x", TECHNIQUES, total_ms=1.0, run_ms=(1.0,), bytes_per_token=1.0)
    monkeypatch.setattr(bench.ablation, "series", lambda job, only: [made_of(row)])
    monkeypatch.setattr(bench.disk, "try_once", no_luck)
    monkeypatch.setattr(bench.roofline, "bandwidth", lambda _: {"read": 1e9, "matvec": 2e9})
    results, said = results_of(job, tmp_path, ["ablation", "roofline"])
    assert [one["name"] for one in results["ablation"]] == ["x"]
    assert results["roofline"] == []
    assert any(sentence.startswith("the disk's ceiling around x could not be measured") for sentence in said)


def test_a_directory_that_is_not_writable_is_refused_before_the_first_row(
    job: BenchJob, tmp_path: Path, monkeypatch: Any
) -> None:
    def run() -> Ran:
        raise AssertionError("it was measured")

    series = Series("x", run, lambda _: Row("x"))
    monkeypatch.setattr(bench.ablation, "series", lambda job, only: [series])
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # tests may run as root
    with pytest.raises(UsageError, match="is not writable"):
        results_of(job, tmp_path, ["ablation"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "expected"), [(0, 3), (2, 2)])
def test_all_that_is_measured_has_the_same_threads(
    store: Store, tmp_path: Path, monkeypatch: Any, given: int, expected: int
) -> None:
    """Those of the configuration where --threads does not say."""
    made: list[BenchJob] = []

    def measure(job: BenchJob, out: Path, **_: Any) -> None:
        made.append(job)
        (out / bench.REPORT).write_text("", encoding="utf-8")

    monkeypatch.setattr(bench, "measure", measure)
    bench_command.main(
        model=str(store.path),
        out=tmp_path,
        prompt_tokens=8,
        tokens=4,
        threads=given,
        draw=False,
        settings=["compute.threads=3"],
    )
    assert made[0].threads == made[0].resolved().compute.threads == expected


def test_the_load_beside_a_ceiling_has_the_jobs_threads(job: BenchJob, monkeypatch: Any) -> None:
    asked: list[str] = []

    def module_command(module: str, *arguments: str) -> list[str]:
        asked.extend((module, *arguments))
        return [sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"]

    monkeypatch.setattr(children, "module_command", module_command)
    monkeypatch.setattr(ceilings.disk, "try_once", lambda *_, **__: Throughput(512, 1, 8, 1e9, 1.0))
    Around(replace(job, threads=3)).now(made_of(Row("x")))
    assert asked[0] == "workers.lab.bench.bandwidth"
    assert asked[asked.index("--threads") + 1] == "3"


def test_rows_and_peers_take_turns(job: BenchJob, tmp_path: Path, monkeypatch: Any) -> None:
    order: list[str] = []

    def series(name: str) -> Series:
        row = Row(name, TECHNIQUES, total_ms=1.0, cold=True, limited=True)
        one = made_of(row)
        one.run = lambda: order.append(name) or ran([0.001])  # type: ignore[func-returns-value]
        return one

    monkeypatch.setattr(bench.ablation, "series", lambda job, only: [series("a"), series("b")])
    monkeypatch.setattr(bench.ablation, "strict", lambda job, found: series(f"strict of {len(found)}"))
    monkeypatch.setattr(bench.peers, "series", lambda *_: [series("peer")])
    done = bench.measure(
        replace(job, repeats=2),
        tmp_path / "out",
        parts=["ablation"],
        draw=False,
        only=(),
        strict=True,
        interpreters={},
        checkpoint=tmp_path,
        beside={},
        say=lambda _: None,
    )
    assert order == [*["a", "b", "peer"] * 2, *["strict of 2"] * 2]
    assert (list(done.rows), list(done.peers)) == (["a", "b", "strict of 2"], ["peer"])
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["peers"]] == ["peer"]


def test_rows_of_a_store_beside_take_turns_under_the_same_bytes(
    job: BenchJob, tmp_path: Path, monkeypatch: Any
) -> None:
    budgets: list[tuple[str, int]] = []

    def run_main(line: Sequence[str], limit: int) -> Ran:
        budgets.append((line[line.index("--model") + 1], limit))
        return ran([0.001])

    monkeypatch.setattr(children, "run_main", run_main)
    done = bench.measure(
        job,
        tmp_path / "out",
        parts=["ablation"],
        draw=False,
        only=["hybrid"],
        strict=False,
        interpreters={},
        checkpoint=None,
        beside={"again": job.store},
        say=lambda _: None,
    )
    assert list(done.rows) == ["hybrid", "again: hybrid"]
    assert budgets == [(str(job.store.path), parse_budget("50%", job.store))] * 2
    assert done.of("again: hybrid")[0].label == "again: "


# -- roofline -------------------------------------------------------------------------------------


def test_the_roof_is_the_larger_of_disk_and_memory():
    disk = (Ceilings(16_384, idle=1e9, loaded=8e8),)
    roof = Roofline(
        row="x",
        request_bytes=16_384,
        memory=50e9,
        flash_bytes=160e6,
        memory_bytes=5e9,
        run_ms=(250,),
        ceilings=disk,
    )
    assert roof.flash_ms == pytest.approx(200)
    assert roof.memory_ms == pytest.approx(100)
    assert (roof.bound, roof.ratio) == ("flash", pytest.approx(1.25))
    assert roof.ratio_idle == pytest.approx(250 / 160)
    cached = Roofline("x", 16_384, 50e9, 0.0, 5e9, (125,), disk)
    assert (cached.bound, cached.ratio) == ("memory", pytest.approx(1.25))
    there = replace(roof, bus=1e9, bus_bytes=220e6)
    assert (there.bound, there.bus_ms) == ("bus", pytest.approx(220))
    assert there.ratios == [there.ratio] == [pytest.approx(250 / 220)]
    assert there.ratio_idle == there.ratio
    (header, _, line) = table.roofline([there]).splitlines()
    assert header.count("|") == line.count("|") == table.roofline([roof]).splitlines()[0].count("|") + 3
    assert "| 1.0 | 0.22 | 220 | bus |" in line


def test_what_a_token_reads_of_memory(job: BenchJob) -> None:
    a = job.store.architecture
    tables = 2 * (a.max_positions + (a.learned_positions or 0)) * a.d_model
    resident = job.store.manifest.files[RESIDENT].bytes - tables  # the tied embedding is the head
    assert resident_bytes(job) == resident
    maps = load_file(job.store.path / PREDICTORS / "default.safetensors")

    def matrices(prefix: str) -> int:
        return sum(
            maps[name].nbytes for name in maps if name.startswith(prefix) and name.endswith((".down", ".up"))
        )

    both = matrices("layers.") + matrices("inlayer.")
    touched = Row("x", touched_bytes=1000)
    assert memory_bytes(job, touched) == resident + both + 1000
    in_layer = Row("x", touched_bytes=1000, settings=ablation.IN_LAYER)
    assert memory_bytes(job, in_layer) == resident + matrices("inlayer.") + 1000
    everything = Row("x", touched_bytes=1000, settings={"predictor.kind": "all"})
    assert memory_bytes(job, everything) == resident + 1000


def test_the_curve_goes_from_the_least_to_the_whole(job: BenchJob) -> None:
    budgets = curve.budgets(job, {}, 3)
    layout = job.store.layout

    def slots(budget: int) -> set[int]:
        config = job.resolved().replace(memory={"budget": f"{budget}B"})
        return set(plan(job.store, config).plan.slots)

    assert slots(budgets[0]) == {1}
    assert slots(budgets[2] - 1) == {layout.most_units - 1}
    assert slots(budgets[2]) == {layout.most_units}
    assert budgets[1] == (budgets[0] + budgets[2]) // 2
    assert int(quick_budget(job.store, (), job.context, 1)[:-1]) == budgets[0] + layout.total_bytes // 4


def test_each_run_is_held_against_the_ceilings_around_it(job: BenchJob) -> None:
    around = [Ceilings(512, idle, idle / 2) for idle in (3e9, 1e9, 2e9)]
    row = Row("x", total_ms=2.4, run_ms=(1.0, 3.0, 2.4), bytes_per_token=1e6)
    roof = measure_roof(job, row, {"read": 5e9, "matvec": 4e9}, around)
    assert (roof.request_bytes, roof.disk_idle, roof.disk_loaded) == (512, 2e9, 1e9)
    assert roof.ratios == pytest.approx((1.0 / (2 / 3), 3.0 / 2, 2.4 / 1))
    assert (roof.ratio, roof.total_ms) == (pytest.approx(1.5), 2.4)
    assert roof.ratio_idle == pytest.approx(3.0)


def test_ceilings_before_and_after_a_run_count_by_the_time_that_they_take():
    between = Ceilings(512, 1e9, 2e9).between(Ceilings(1024, 3e9, 2e9))
    assert between == Ceilings(1024, pytest.approx(1.5e9), pytest.approx(2e9))


def test_ceilings_after_a_run_are_those_before_the_next(
    job: BenchJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ceiling(store: Store, request: int, **how: Any) -> Throughput:
        asked.append((request, how["sequential"], how["dtype"]))
        return Throughput(request, 1, 8, 1e9 * len(asked), 1.0)

    monkeypatch.setattr(ceilings.disk, "ceiling", ceiling)
    around = Around(job)
    stride, long = job.store.layout.stride, job.store.layout.layers[0].bytes
    bundles = made_of(Row("x", bytes_per_token=3.2 * stride, reads_per_token=2))
    first = around.now(bundles)
    assert first == Ceilings(stride, 1e9, 2e9) == around.now(bundles)
    bundles.again()
    around.ran()
    assert around.now(bundles) == Ceilings(2 * stride, 3e9, 4e9)
    assert around.now(job.naive()).request_bytes == long
    assert asked == [
        (stride, False, None), (stride, False, "float16"),
        (2 * stride, False, None), (2 * stride, False, "float16"),
        (long, True, None), (long, True, "float16"),
    ]  # fmt: skip


# -- tables ---------------------------------------------------------------------------------------


def test_tables_are_rectangular_and_name_failures():
    found = [
        Row("naive", total_ms=1500, io_ms=1400, bytes_per_token=13e9, run_ms=(1500.0,)),
        Row("hybrid", ("hybrid",), error="killed, as by the memory limit"),
        Row("+ overlap", TECHNIQUES, total_ms=100, p10_ms=90.04, p90_ms=110),
    ]
    text = table.ablation(found, TECHNIQUES)
    assert {line.count("|") for line in text.splitlines()} == {19}
    assert "| hybrid | ✓ | – | – | – | – | not measured: killed, as by the memory limit |" in text
    assert "| **1500** |" in text
    assert "| 90.0–110 |" in text
    assert table.speedups(found, []).splitlines()[::2] == [
        "|  | MB a token | ms | than naive | ÷ roof |",
        "| + overlap | 0 | 100 | 15.0 × |  |",
    ]
    roof = Roofline("+ overlap", 512, 1e9, 0.0, 8e7, (100.0,), (Ceilings(512, 1e9, 1e9),))
    faster = table.speedups(found, [Row("airllm", total_ms=2000), Row("other", error="killed")], [roof])
    assert faster.splitlines()[-1] == "| + overlap | 0 | 100 | 15.0 × | 20.0 × | 1.25 |"
    assert table.speedups(found[:2], []) == "No ring could be measured."
    assert {line.count("|") for line in table.curve(found).splitlines()} == {12}


def test_the_disk_table_has_a_column_for_each_depth():
    tries = [
        Throughput(4096, 1, 8, 1e9, 5.0),
        Throughput(4096, 1, 32, 2e9, 4.0),
        Throughput(16384, 2, 8, 3e9, 6.0),
    ]
    assert table.disk(tries).splitlines()[2:] == [
        "| 4 | 1 | 1.00 | 2.00 | 4.0 |",
        "| 16 | 2 | 3.00 |  | 6.0 |",
    ]


# -- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown peer 'llama'"):
        peers.interpreters(["llama"], {})
    with pytest.raises(UsageError, match=r"accelerate has no environment at .*docs/bench\.md"):
        peers.interpreters(["accelerate"], {})
    here = Path(sys.executable)
    assert peers.interpreters(["airllm"], {"airllm": here}) == {"airllm": here}
    (tmp_path / "short.txt").write_text("Once upon a time", encoding="utf-8")
    with pytest.raises(UsageError, match="fewer than 8 \\+ 40 tokens"), _job(store, tmp_path, 8, 40):
        pass
    with pytest.raises(UsageError, match="beyond the model's context"), _job(store, TEXT.parent, 100, 100):
        pass


def _job(store: Store, directory: Path, prompt: int, count: int) -> Any:
    text = TEXT if directory == TEXT.parent else directory / "short.txt"
    return make_job(
        store,
        text=text,
        prompt_tokens=prompt,
        count=count,
        budget="50%",
        repeats=1,
        threads=1,
        quick=True,
        settings=(),
        say=lambda _: None,
    )


def test_a_peer_computes_on_the_benchs_device_or_is_refused(
    job: BenchJob, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With what the ring may take of its memory."""
    monkeypatch.setattr(peers.devices, "probe", lambda kind: devices.Found("a GPU", 10 << 30, 12 << 30))
    asked: list[list[str]] = []
    monkeypatch.setattr(peers.children, "run", lambda line, *_: asked.append(line))
    there = {kind: replace(job, settings=(f"compute.device={kind}",)) for kind in ("torch-cpu", "cuda")}
    here = Path(sys.executable)
    with pytest.raises(UsageError, match="airllm computes on the CPU here, not on cuda"):
        peers.series(there["cuda"], {"airllm": here}, checkpoint, tmp_path)
    for own in there.values():
        (row,) = peers.series(own, {"accelerate": here}, checkpoint, tmp_path)
        row.run()
    assert "--device" not in asked[0]
    assert asked[1][asked[1].index("--device") :][:2] == ["--device", "cuda"]
    assert asked[1][asked[1].index("--device-limit") + 1] == str(9 << 30)


def test_accelerate_gets_less_than_there_is() -> None:
    gib = 1 << 30
    assert run_accelerate.shares(10 * gib, "cpu", 0) == {"cpu": 5 * gib}
    assert run_accelerate.shares(10 * gib, "cuda", 5 * gib) == {0: 4 * gib, "cpu": 4 * gib}
    assert run_accelerate.shares(10 * gib, "mps", 5 * gib) == {"mps": 4 * gib, "cpu": 4 * gib}


def test_a_disk_too_short_for_a_peer_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    peers.check_space(["airllm"], checkpoint, tmp_path)
    monkeypatch.setattr(peers.shutil, "disk_usage", lambda _: Throughput_free(1000))
    with pytest.raises(DiskFull, match="airllm writes"):
        peers.check_space(["airllm"], checkpoint, tmp_path)
    peers.check_space(["accelerate"], checkpoint, tmp_path)  # reads the checkpoint itself


class Throughput_free:  # noqa: N801 - stands for shutil's usage tuple
    """What `shutil.disk_usage` returns, with so much free."""

    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "ablation,speed"], "unknown part 'speed'"),
        (["--parts", ""], "nothing to measure"),
        (
            ["--prompt-tokens", "8", "--tokens", "4", "--row", "fast"],
            "no row 'fast'; its rows are naive; hybrid; + predictor",
        ),
        (["--parts", "disk", "--row", "naive"], "--row names rows of the ablation, which --parts leaves out"),
        (["--peers", "accelerate", "--peer-python", f"accelerate={sys.executable}"], "needs --checkpoint"),
        (["--peer-python", "accelerate"], "takes NAME=PATH"),
        (["--quick", "--memory", "1MiB"], "--quick has a budget of its own"),
    ],
)
def test_wrong_use_is_one_sentence(
    store: Store, tmp_path: Path, arguments: list[str], words: str, here: Any
) -> None:
    line = ["--model", store.path, "--out", tmp_path / "out", "--no-plots", *arguments]
    done = here(bench_command.run, *line)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_child_is_told_by_its_last_words():
    with pytest.raises(ChildFailed, match="status 3: no luck"):
        children.run([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(ChildFailed, match="printed no result: 'words"):
        children.run([sys.executable, "-c", "print('words')"])
    assert children.run([sys.executable, "-c", "print('x', '{\"a\": 1}')"]).result == {"a": 1}


# -- the baseline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
@pytest.mark.parametrize("variant", ["opt", "opt-projected", "opt-post-norm", "falcon-7b", "qwen3-moe"])
def test_the_naive_baseline_computes_the_model(variant: str, device: str, tmp_path: Path) -> None:
    made = convert(
        write_checkpoint(tmp_path / "checkpoint", variant, "float16"), tmp_path / "store", name=variant
    )
    tokens = [2, 17, 40, 9, 77, 31]
    with DenseModel(made, 1) as dense:
        expected = dense.forward([tokens])[0].numpy()
    with NaiveModel(made, len(tokens), 1, device) as model:
        found = [model.forward(token, position) for position, token in enumerate(tokens)]
        assert (model.device.counters().get("decode_bus_bytes", 0) > 0) == (device != "cpu")
        weights = made.layout.total_bytes + resident_weights(made)
        assert model.stream.bytes >= len(tokens) * weights  # everything, for every token
    np.testing.assert_allclose(np.stack(found), expected, rtol=2e-3, atol=2e-3)


def resident_weights(store: Store) -> int:
    """Bytes of the matrices that a token multiplies with, without its embedding."""
    a = store.architecture
    attention = sum(a.d_model * (one.attention.projected + one.attention.width) for one in a.layers)
    return 2 * (attention + a.vocabulary * a.embed_dim)


# -- the techniques that can be turned off ----------------------------------------------------------


def test_without_a_window_every_token_begins_with_empty_slots():
    residency = Residency(16, 4, KeepNothing())
    for step in range(2):
        residency.begin(step)
        ids = np.array([1, 5])
        assert (residency.lease(ids) == NOWHERE).all()
        residency.admit(ids)
        residency.use(ids, step)
        residency.validate()


@pytest.mark.parametrize("stride", [512, 1024, 1536, 18432])
def test_bundles_by_halves_bring_the_same_bytes(stride: int) -> None:
    layout = Layout.uniform(4, 10, neuron("float16", stride // 4))
    requests = RequestBuilder(
        base=1 << 20, slots=8, stride=stride, layout=layout, max_read=1 << 20, max_gap=0, sink=0
    )
    positions, slots = np.array([7, 2, 3], np.int32), np.array([0, 5, 1], np.int32)

    def landed(requests: Any) -> dict[int, int]:
        """Address → file offset, of every 512 bytes."""
        found = {}
        for index in range(len(requests)):
            offset = int(requests.offsets[index])
            for base, length in requests.vector(index):
                for at in range(0, length, 512):
                    found[base + at] = offset + at
                offset += length
        return found

    halves = requests.build_halves(2, positions, slots)
    whole = requests.build(2, positions, slots)
    assert landed(halves) == landed(whole)
    assert halves.total_bytes == whole.total_bytes == 3 * stride
    if stride > 512:
        assert len(halves) == 6
        assert halves.offsets[0] // stride == halves.offsets[3] // stride  # first halves, then second ones
        assert not (halves.offsets % 512).any()


# -- everything -------------------------------------------------------------------------------------


@pytest.mark.timeout(900)  # seven rings one after another; half a minute on two idle cores
@pytest.mark.ring
def test_a_quick_bench_measures_every_part(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "results"
    line = [sys.executable, str(ROOT / "run.py"), "bench", "--model", str(store.path), "--quick"]
    done = subprocess.run([*line, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert done.stdout == (out / "results.md").read_text(encoding="utf-8") + "\n"
    errors = [row["error"] for row in (*results["ablation"], *results["curve"]) if row["error"]]
    assert errors == []
    names = [row["name"] for row in results["ablation"]]
    assert names == ["naive", "hybrid", "+ predictor", "+ window", "+ bundling", "+ overlap"]
    row = {one["name"]: one for one in results["ablation"]}
    layout = store.layout
    assert row["naive"]["bytes_per_token"] >= layout.total_bytes + resident_weights(store)
    # Without a window all that is predicted is read, every token; halves are twice as many reads.
    nothing, window, bundled = row["+ predictor"], row["+ window"], row["+ bundling"]
    assert nothing["hit_rate"] == 0
    # Bundles of one sector cannot be halved, and neighbours are joined: at least one bundle a read.
    assert layout.stride == 512
    assert nothing["request_bytes"] >= layout.stride
    assert window["bytes_per_token"] < nothing["bytes_per_token"]
    assert bundled["bytes_per_token"] == window["bytes_per_token"]
    for one in results["ablation"]:
        assert one["total_ms"] > 0
        assert one["dram_bytes"] > 0
    whole = results["curve"][-1]
    assert whole["bytes_per_token"] == 0, "with the whole model in memory nothing is read"
    assert {one["depth"] for one in results["disk"]} == {8}
    assert [roof["ratio"] > 0 for roof in results["roofline"]] == [True]
    assert results["conditions"]["cores"] >= 1
    for plot in ("ablation.png", "curve.png", "disk.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.partial"))


@pytest.mark.ring
def test_the_price_of_a_layer_adds_up_to_the_token(store: Store) -> None:
    cost = price.measure(str(store.path), ["predictor.kind=all"], prompt_tokens=4, tokens=6)
    count = len(store.layout.layers)
    each = cost.attention + cost.ffn + cost.waiting + cost.rest
    assert cost.tokens == 5
    assert cost.head + count * each == pytest.approx(cost.token)
    matrices = sum(
        Tensors(store.path / RESIDENT).place(layer(index, f"{name}.weight")).bytes
        for index in range(count)
        for name in ("qkv", "out")
    )
    a = store.architecture.layers[0].attention
    kept = 2 * (4 + 6 / 2) * a.kv_heads * a.head_dim * 4  # float32 keys and values at the mean position
    least = (matrices + count * kept) / count
    unit = store.layout.layers[0]
    assert least < 1e6 * cost.megabytes <= least + unit.units * unit.unit.bytes
    assert cost.reading == pytest.approx(1e3 * 1e6 * cost.megabytes / cost.read_rate)
