"""Stamps of a layer's way through a ring, and what the profile makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from ring import config, plan_for

from pipeline.ring import timeline
from pipeline.ring.messages import EMBEDDING
from pipeline.ring.plan import Forecast
from pipeline.ring.session import Session
from pipeline.ring.timeline import (
    ANNOUNCED,
    ANSWERED,
    COMPLETE,
    COMPUTED,
    HEARD,
    KNOWN,
    NEEDED,
    PREDICTED,
    READ,
    Timeline,
)
from storage.convert import convert
from workers.lab import screens
from workers.lab.bench import layers, stamping


def stamps(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Of (event, step, layer, microseconds)."""
    return np.array([(event, step, layer, 0, 0, 1000 * at) for event, step, layer, at in rows], np.int64)


# Layer 1 of step 4, foreseen from layer 0, and layer 0, foreseen from the embedding.
ROWS = stamps(
    (ANNOUNCED, 4, EMBEDDING, 0),
    (ANNOUNCED, 4, 0, 10),
    (HEARD, 4, 0, 30),
    (PREDICTED, 4, 1, 70),
    (NEEDED, 4, 0, 11),
    (COMPUTED, 4, 0, 50),
    (ANSWERED, 4, 1, 100),
    (NEEDED, 4, 1, 90),
    (KNOWN, 4, 1, 130),
    (COMPLETE, 4, 1, 130),
    (READ, 4, 1, 190),
    (COMPLETE, 4, 1, 200),
    (COMPUTED, 4, 1, 260),
    (COMPUTED, 5, 1, 999),
)


def test_a_layers_way_begins_where_its_source_was_announced():
    (one,) = layers.layers_of(ROWS, Forecast("lowrank", 1, refine=False), 4, 4)
    found = {name: spread.median for name, spread in layers.stages_of([one]).items()}
    assert found == {
        "announced → predictor has it": 20,
        "predictor": 40,
        "announced → answered": 90,
        "announced → read": 180,
        "schedule there → compute has it": 30,
        "reads there → compute has them": 10,
        "compute: needed → first part": 40,
        "compute: first part → last part": 70,
        "compute: last part → computed": 60,
    }


def test_without_look_ahead_a_layer_is_its_own_source():
    (one,) = layers.layers_of(ROWS, Forecast("lowrank", 0, refine=False), 4, 4)
    assert one == {ANNOUNCED: 10_000, HEARD: 30_000, NEEDED: 11_000, COMPUTED: 50_000}


def test_stamps_are_kept_only_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for wanted in (False, True):
        if wanted:
            monkeypatch.setenv(timeline.DIRECTORY, str(tmp_path))
        one = Timeline.wanted("ring", "prefetcher")
        one.mark(READ, 3, 2, 1, 4096)
        one.write()
        assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.stamps")] == [
            "ring/prefetcher.stamps"
        ] * wanted
    assert timeline.read(tmp_path)[:, :5].tolist() == [[READ, 3, 2, 1, 4096]]


def test_a_timeline_ends_at_its_limit_and_its_owner_goes_on(tmp_path: Path):
    one = Timeline(tmp_path / "x.stamps", most=5)
    for step in range(4):
        one.mark(READ, step, 0)
    one.write()
    for step in range(4, 9):
        one.mark(READ, step, 0)
    one.write()
    one.mark(READ, 99, 0)
    one.write()
    kept = np.fromfile(tmp_path / "x.stamps", np.int64).reshape(-1, timeline.COLUMNS)
    assert kept[:, timeline.STEP].tolist() == [0, 1, 2, 3, 4]
    assert not one.on


@pytest.mark.ring
def test_a_ring_stamps_every_layer_that_it_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = convert(write_checkpoint(tmp_path / "checkpoint", "opt", "float16"), tmp_path / "store", name="t")
    chosen = config(predictor={"kind": "oracle", "lookahead": 0, "refine": False})
    (tmp_path / "stamps").mkdir()
    monkeypatch.setenv(timeline.DIRECTORY, str(tmp_path / "stamps"))
    with Session(store, chosen, plan_for(store, chosen, slots=4)) as session:
        found = layers.measure(session, [2, 17, 40], [9, 77, 31, 5])
    taken = timeline.read(tmp_path / "stamps")
    last = int(taken[:, timeline.STEP].max())
    of_layers = layers.layers_of(taken, session.plan.forecast, last - 2, last)
    assert len(of_layers) == 3 * session.plan.layers
    assert all(one[ANNOUNCED] < one[ANSWERED] < one[COMPUTED] for one in of_layers)
    assert found.layer_us > 0
    assert {name.split()[0] for name in found.cores} == {"predictor", "cache", "prefetcher", "compute"}


def test_what_stamps_cost_is_told_by_turns():
    cost = stamping.Cost.of([0.010, 0.020, 0.040], [0.011, 0.020, 0.042], 125.0)
    assert (cost.off_ms, cost.on_ms) == (20, 20)
    assert cost.ratio == pytest.approx(1.05)
    assert cost.ratio_quartiles == pytest.approx((1.0, 1.1))


def test_a_picture_of_a_terminal_fetches_nothing(tmp_path: Path):
    screens.draw(tmp_path / "x.svg", "run.py timeline", "a line")
    svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "a&#160;line" in svg
    assert "@font-face" not in svg
    assert "url(http" not in svg
