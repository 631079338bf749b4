"""The bench of a mixture of experts: its rows, its roof, and its baseline's mathematics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint

from storage.convert import convert
from storage.manifest import RESIDENT
from storage.store import Store
from workers.lab.bench import ablation, bench, prefill
from workers.lab.bench.ceilings import Around
from workers.lab.bench.job import TEXT, BenchJob, make_job
from workers.lab.bench.naive import NaiveModel
from workers.lab.bench.roofline import memory_bytes, resident_bytes
from workers.lab.bench.rows import ROUTED, Row
from workers.lab.offline.dense import DenseModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight experts, three a token, and one dense layer of three."""
    base = tmp_path_factory.mktemp("mixture")
    checkpoint = write_checkpoint(base / "checkpoint", "qwen3-moe-dense-layer", "bfloat16")
    return convert(checkpoint, base / "store", name="mixture")


@pytest.fixture
def job(store: Store) -> Iterator[BenchJob]:
    with make_job(
        store,
        text=TEXT,
        prompt_tokens=8,
        count=6,
        budget="500MiB",
        repeats=1,
        threads=1,
        quick=True,
        settings=(),
        say=lambda _: None,
    ) as made:
        yield made


ROWS = ["naive", "+ router set", "+ slots", "+ hits first", "+ guesses", *dict(ablation.LOSSY)]


def test_each_row_of_a_mixture_adds_one_technique(job: BenchJob) -> None:
    found = ablation.series(job)
    assert [series.name for series in found] == ROWS
    assert [series.techniques for series in found] == [
        *(ROUTED[:count] for count in range(5)),
        ROUTED,
        ROUTED,
    ]
    assert [ablation.complete(job, series) for series in found] == [False] * 4 + [True] + [False] * 2
    rows = [Row(series.name, series.techniques, total_ms=1.0) for series in found]
    assert ablation.strict(job, rows) is None, "half of the checkpoint is nothing to a mixture"
    quicker = [replace(row, total_ms=0.5) if row.name.startswith("lossy") else row for row in rows]
    best = ablation.best(quicker)
    assert best is not None
    assert best.total_ms == 1.0, "another text is no better way to the same"
    for _, settings in (*ablation.MIXED, *ablation.LOSSY):
        job.resolved(settings)  # every setting is one


def test_a_piece_of_an_expert_is_one_read(
    job: BenchJob, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ceiling(store: Store, request: int, **how: object) -> object:
        asked.append(request)
        raise LookupError

    monkeypatch.setattr("workers.lab.bench.ceilings.disk.ceiling", ceiling)
    stride = store.layout.stride
    assert stride > 4096
    pieces = -(-stride // 4096)
    cut = replace(job, settings=("prefetcher.max_read=4096",))
    with pytest.raises(LookupError):
        Around(cut).now(cut.ring("x"))
    assert asked == [round(stride / pieces / 4096) * 4096]


def test_what_a_token_reads_of_memory(job: BenchJob, store: Store) -> None:
    a = store.architecture
    embedding = 2 * a.vocabulary * a.embed_dim
    assert not a.tied_head
    assert resident_bytes(job) == store.manifest.files[RESIDENT].bytes - embedding
    assert memory_bytes(job, Row("x", touched_bytes=1000)) == resident_bytes(job) + 1000


def test_a_token_is_multiplied_with_its_own_experts(store: Store) -> None:
    """Attention, routers and the dense layer, and three of eight experts in the others."""
    a = store.architecture
    attention = sum(a.d_model * (one.attention.projected + one.attention.width) for one in a.layers)
    expected = attention
    for layer in a.layers:
        ffn = layer.ffn
        if ffn.router is None:
            assert ffn.shared is not None
            expected += 3 * ffn.shared.width * a.d_model
        else:
            expected += ffn.units * a.d_model + 3 * ffn.router.top_k * ffn.width * a.d_model
    assert prefill.multiplied(store) == expected


def test_the_naive_baseline_computes_a_mixture(store: Store) -> None:
    tokens = [2, 17, 40, 9, 77, 31]
    with DenseModel(store, 1) as dense:
        expected = dense.forward([tokens])[0].numpy()
    with NaiveModel(store, len(tokens), 1) as model:
        found = [model.forward(token, position) for position, token in enumerate(tokens)]
        assert model.stream.bytes >= len(tokens) * store.layout.total_bytes  # every expert, for every token
    np.testing.assert_allclose(np.stack(found), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.timeout(900)  # seven rings one after another
@pytest.mark.ring
def test_a_quick_bench_of_a_mixture(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "results"
    line = [sys.executable, str(ROOT / "run.py"), "bench", "--model", str(store.path), "--quick"]
    line += ["--no-plots", "--parts", "ablation,curve", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["error"] for row in (*results["ablation"], *results["curve"]) if row["error"]] == []
    row = {one["name"]: one for one in results["ablation"]}
    assert list(row) == ROWS
    unit = store.layout.layers[0].unit
    chosen = 2 * 3 * unit.stride  # of two layers, three experts
    assert row["+ router set"]["hit_rate"] == 0
    assert row["+ router set"]["bytes_per_token"] == chosen
    assert row["+ router set"]["touched_bytes"] == 2 * 3 * unit.bytes
    assert 0 < row["+ slots"]["bytes_per_token"] < chosen
    assert row["+ hits first"]["bytes_per_token"] == row["+ slots"]["bytes_per_token"]
    assert row["+ guesses"]["hit_rate"] > 0
    least, whole = results["curve"]
    assert 0 < least["hit_rate"] <= least["best_hit_rate"] < 1
    assert whole["hit_rate"] == whole["best_hit_rate"] == 1
    assert "Belady's" in done.stdout
    assert bench.CLIFF in done.stdout
