"""The commands that make a shadow, check it and use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from test_cli import refused, run
from test_shadow import VARIANTS
from test_synthetic_stores import BUILTIN, SHAPES

from storage import shadow as shadows
from storage.convert import convert
from storage.shadow import Shadow
from storage.store import Store
from workers.lab.bench import ablation
from workers.lab.bench.job import TEXT, make_job
from workers.lab.bench.roofline import memory_bytes, resident_bytes
from workers.lab.bench.rows import Row
from workers.lab.synthesis import __main__ as synthesis


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("commands") / "checkpoint"
    return write_checkpoint(directory, "falcon-7b", "bfloat16", changes=VARIANTS["falcon-7b"])


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    out = checkpoint.with_name("store")
    done = run("convert", checkpoint, out, "--shadow", "4")
    assert done.returncode == 0, done.stderr
    return out


def test_a_shadow_is_made_with_its_store_or_later(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    path = shadows.path_of(Store.open(store))
    later = convert(checkpoint, tmp_path / "later", name="later")
    done = run("shadow", later.path)
    assert done.returncode == 0
    assert "hold its" in done.stderr
    assert shadows.path_of(later).read_bytes() == path.read_bytes()
    assert run("verify", store).returncode == 0


def test_a_sparse_model_and_an_odd_number_of_bits_are_refused(store: Path, tmp_path: Path) -> None:
    assert refused("shadow", store, "--bits", "3") == (2, "a shadow has 4 or 8 bits, not 3")
    status, sentence = refused("--prompt", "x", "--model", store, "--quality", "best")
    assert status == 2
    assert sentence == "--quality is one of exact, high, balanced, fast, small, not 'best'"


@pytest.mark.kernels("a shadow is computed by them")
@pytest.mark.ring
def test_small_reads_nothing_and_says_so(store: Path) -> None:
    line = ["--prompt", "abc", "--model", store, "--max-new-tokens", "4", "--quality", "small"]
    done = run(*line, "--set", "cache.share=0.25", "--json")
    assert "quality small: FFN in q4, nothing is read; what that costs was not measured" in done.stderr
    result = json.loads(done.stdout)
    assert result["flash"]["bytes_read"] == 0
    assert result["lossy"] == ["FFN in q4"]


def test_the_bench_has_a_row_for_each_quality(store: Path) -> None:
    opened = Store.open(store)
    some: dict[str, Any] = {"text": TEXT, "prompt_tokens": 8, "count": 4, "budget": "50%", "repeats": 1}
    with make_job(opened, threads=1, quick=True, settings=(), say=lambda _: None, **some) as job:
        names = [series.name for series in ablation.series(job)]
        words = ["high", "balanced", "fast", "small"]
        assert names == ["naive", "hybrid", *(f"quality {word}" for word in words)]
        one = replace(job, settings=("predictor.quality=fast",))
        assert [series.name for series in ablation.series(one)] == ["naive", "hybrid", "quality fast"]
        row = Row("quality fast", touched_bytes=100.0, settings={"predictor.quality": "fast"})
        assert memory_bytes(job, row) == resident_bytes(job) + Shadow.open(opened).bytes + 100


def test_a_synthetic_store_may_have_a_shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "find_shape", lambda _: SHAPES["silu"])
    line = ["--shape", "silu", "--out", str(tmp_path / "store"), "--bits", "16", "--shadow", "4"]
    monkeypatch.setattr("sys.argv", ["synthesize", *line, "--tokenizer", str(BUILTIN), "--layers", "2"])
    assert synthesis.run() == 0
    Shadow.open(Store.open(tmp_path / "store"))
