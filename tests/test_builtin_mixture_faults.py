"""What goes wrong with the shipped mixture: deaths, cancels, full disks, damaged experts; and its budget."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from damage import contents, flip
from ring import config, generate, plan_for
from test_budget import stays_within
from test_convert import child
from test_death import WORKERS, ended, frozen_generation

from pipeline.models import builtin
from pipeline.models.names import configure
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import DamagedStore, StoreCorrupt, StoreIncomplete
from storage.manifest import BUNDLES, RESIDENT
from storage.repair import repair
from storage.store import Store
from storage.verify import verify

LAYER, EXPERT = 3, 7
ROUTED = config(
    predictor={"kind": "auto", "refine": None}, cache={"slots_per_layer": 8}, storage={"verify": "always"}
)


@pytest.fixture(scope="module")
def store() -> Store:
    source, _ = configure(builtin.MIXTURE, None, ())
    return source.open_store()


@pytest.fixture
def own(store: Store, tmp_path: Path) -> Store:
    """A copy that may be damaged."""
    return Store.open(Path(shutil.copytree(store.path, tmp_path / "store")))


@pytest.mark.ring
def test_a_run_in_the_least_memory_stays_within_it(store: Store) -> None:
    stays_within(store)


@pytest.mark.ring
@pytest.mark.parametrize("victim", WORKERS)
def test_a_killed_worker_ends_the_command_by_name(store: Store, victim: str) -> None:
    with frozen_generation(store.path) as (process, workers):
        workers[victim].send_signal(signal.SIGKILL)
        status, errors = ended(process, workers)
    assert status == 1
    assert f"the {victim} worker" in errors
    assert "SIGKILL" in errors


@pytest.mark.ring
def test_a_cancelled_text_leaves_nothing_in_the_next(store: Store) -> None:
    with Session(store, ROUTED, plan_for(store, ROUTED)) as session:
        expected = generate(session, 8)
        for number, _ in enumerate(session.generate([2, 90, 3], GenerationParams(50, ignore_eos=True))):
            if number == 4:
                break  # abandoned: cancelled and drained
        assert generate(session, 8) == expected


@pytest.mark.parametrize("file", [BUNDLES, RESIDENT])
def test_a_disk_that_fills_up_while_it_is_converted(store: Store, tmp_path: Path, file: str) -> None:
    """A limit on file sizes stands in for the disk. With room the same command goes on."""
    out = tmp_path / "store"
    sizes = {name: entry.bytes for name, entry in store.manifest.files.items()}
    assert sizes[RESIDENT] < sizes[BUNDLES]
    limit = sizes[BUNDLES] - 1 if file == BUNDLES else sizes[RESIDENT] - 1
    full = child(builtin.MIXTURE_FILE, out, 0, limit)
    assert full.returncode == 1
    assert full.stderr.startswith("DiskFull: no space left for")
    with pytest.raises(StoreIncomplete):
        Store.open(out)
    made = convert(builtin.MIXTURE_FILE, out, name="child")
    for name in (BUNDLES, RESIDENT):
        assert made.manifest.files[name] == store.manifest.files[name]


@pytest.mark.ring
@pytest.mark.parametrize("role", ["gate", "down"])
def test_a_damaged_expert_is_named_makes_no_text_and_is_mended(own: Store, store: Store, role: str) -> None:
    unit = own.layout.layers[LAYER].unit
    start, stop = unit.span("gate" if role == "gate" else "down")
    place = own.layout.offset(LAYER, EXPERT)
    flip(own.path / BUNDLES, place + (start if role == "gate" else stop - 1))  # a code, a minimum
    named = rf"layer {LAYER}, unit {EXPERT}, at byte {place:,}, does not match its checksum"
    with pytest.raises(StoreCorrupt, match=named):
        verify(own.path)
    with Session(own, ROUTED, plan_for(own, ROUTED)) as session, pytest.raises(DamagedStore, match=named):
        generate(session, 2, list(range(5, 45)))  # so many tokens choose every expert
    repair(own.path, builtin.MIXTURE_FILE)
    assert contents(own.path) == contents(store.path)
    verify(own.path)
