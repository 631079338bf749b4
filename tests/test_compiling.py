"""Kernels that are missing are compiled by processes that end, before the ring takes its memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import predictors
import pytest
from checkpoints import write_checkpoint
from ring import config, generate, plan_for

from pipeline.planner import divide
from pipeline.ring import compiling, supervisor
from pipeline.ring.memory import proportional_bytes
from pipeline.ring.session import Session
from storage.convert import convert
from storage.store import Store
from workers.compute.compiling import of_compute, of_predictor, ready
from workers.kernels import lowrank, norms

pytestmark = [pytest.mark.ring, pytest.mark.kernels("torch compiles nothing")]

NOTE = "kernels: compiled before the start"
AUTO = config(predictor={"kind": "auto", "refine": None})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("compiling")
    return convert(write_checkpoint(base / "checkpoint", "qwen3-moe", "bfloat16"), base / "store", name="m")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("compiling")
    store = convert(write_checkpoint(base / "checkpoint", "opt", "bfloat16"), base / "store", name="o")
    layers = range(len(store.layout.layers))
    predictors.write(
        store, {**predictors.maps(store, "layers", layers), **predictors.maps(store, "inlayer", layers)}
    )
    return store


Without = Callable[[Any, Store], Path]


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Without:
    """Makes a cache that has all of a store's kernels but one, whose file it returns."""

    def make(kernel: Any, store: Store) -> Path:
        chosen = plan_for(store, AUTO)
        assert ready(
            [*of_compute(store, "float32", chosen.forecast.kind), *of_predictor(chosen.forecast.kind)],
            store,
            True,
        )
        full = Path(kernel._cache.cache_path)
        copy = shutil.copytree(full, tmp_path / "numba" / full.name)
        (index,) = copy.glob(f"*.{kernel.__name__}-*.nbi")
        index.unlink()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(copy.parent))
        return index

    return make


def compiled(directory: Path) -> dict[Path, int]:
    """When each file was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize(("kernel", "model"), [(norms._rms_norms, "mixture"), (lowrank._passing, "opt")])
def test_no_worker_compiles(
    without: Without,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Any,
    model: str,
) -> None:
    """Neither at its start nor later, and what it takes to compile is within the least plan."""
    store: Store = request.getfixturevalue(model)
    index = without(kernel, store)
    after: list[dict[Path, int]] = []

    def compile_kernels(*given: Any) -> int:
        peak = compiling.compile_kernels(*given)
        after.append(compiled(index.parent))
        others = peak - proportional_bytes([os.getpid()])  # this process is larger than a supervisor
        assert 50 << 20 < others < divide.least(store, AUTO).total - divide.BASES["supervisor"]
        return peak

    monkeypatch.setattr(supervisor, "compile_kernels", compile_kernels)
    plan = plan_for(store, AUTO)
    with Session(store, AUTO, plan) as session:
        assert NOTE in session.ring.notes
        first = generate(session, 6)
    assert index in after[0]
    assert compiled(index.parent) == after[0]
    with Session(store, AUTO, plan) as session:
        assert NOTE not in session.ring.notes
        assert generate(session, 6) == first
    assert len(after) == 1


def test_where_that_fails_the_workers_do_it(
    mixture: Store, without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = without(norms._rms_norms, mixture)
    monkeypatch.setattr(compiling, "COMPILER", "workers.nothing")
    with Session(mixture, AUTO, plan_for(mixture, AUTO)) as session:
        assert len(generate(session, 3).tokens) == 3
    assert index.exists()


def test_an_empty_cache_is_noticed(mixture: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled: the workers refuse, and end with their ring."""

    class Asked(Exception):
        pass

    def compile_kernels(*given: Any) -> int:
        raise Asked

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(supervisor, "compile_kernels", compile_kernels)
    with pytest.raises(Asked):
        Session(mixture, AUTO, plan_for(mixture, AUTO))
    assert not list(tmp_path.rglob("*.nbc"))
