"""The first use of a model without zeros: what is made, what is said, and where it stays exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from test_cli import run
from test_shadow import VARIANTS

from pipeline import first_dial, launch
from pipeline.config import Config
from pipeline.first_dial import prepared
from pipeline.models.names import configure
from pipeline.models.stores import Source
from storage import shadow as shadows
from storage.dial import DIAL, read_dial
from storage.store import Store

PART = "cache.share=0.25"  # so that a token reads from flash


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a parallel GELU block; converted stores go into a directory of their own."""
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "home"))
    return write_checkpoint(tmp_path / "checkpoint", "falcon-7b", "bfloat16", changes=VARIANTS["falcon-7b"])


def opened(model: Path, *settings: str) -> tuple[Source, Store, Config]:
    source, config = configure(str(model), None, settings)
    return source, source.open_store(), config


@pytest.mark.ring
def test_the_main_command_measures_once_and_takes_the_point(checkpoint: Path) -> None:
    """With text on one stream and words on the other; the second time nothing is measured."""
    line = ("--model", checkpoint, "--prompt", "abc", "--max-new-tokens", "3", "--set", PART)
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert "measuring the dial of checkpoint, once, in about " in done.stderr
    assert len(done.stdout.splitlines()) <= 3
    _, store, _ = opened(checkpoint)
    dial = read_dial(store)
    assert dial is not None
    assert dial.held_out.name == "mixed.txt"
    assert dial.shadow == {"up": "q4", "down": "q4"}
    assert all(point.others == "low" and set(point.reads) == {"up", "down"} for point in dial.points)
    assert not (store.path / "dial.partial").exists()
    told = (
        "runs exactly: no setting of its dial loses less" if dial.default == "exact" else "quality balanced:"
    )
    assert told in done.stderr
    again = run(*line, "--json")
    assert "measuring" not in again.stderr
    assert told in again.stderr
    assert json.loads(again.stdout)["generated_tokens"] == 3


def test_nothing_is_made_where_it_is_no_use_or_not_wanted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in memory; exact; the setting; another device; another kind; a store of the user's own."""
    monkeypatch.setattr(launch, "run_module", lambda *_: pytest.fail("something was measured"))
    for settings in (
        (),
        (PART, "predictor.quality=exact"),
        (PART, "predictor.calibrate=false"),
        (PART, "compute.device=torch-cpu"),
        (PART, "predictor.kind=all"),
    ):
        source, store, config = opened(checkpoint, *settings)
        assert prepared(source, store, config) == config
    source, store, config = opened(store.path, PART)
    assert prepared(source, store, config) == config
    assert not shadows.path_of(store).exists()


def test_a_model_without_a_shadow_runs_exactly_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 80 values have no groups; asked for a quality, planning says the same."""
    monkeypatch.setenv("FLASHRING_HOME", str(tmp_path / "home"))
    odd = write_checkpoint(tmp_path / "odd", "falcon-7b", "bfloat16")
    source, store, config = opened(odd, PART)
    assert prepared(source, store, config).predictor.quality == "exact"
    (sentence,) = capsys.readouterr().err.splitlines()[1:]
    assert sentence.startswith("odd runs exactly: rows of 80 values")
    source, store, config = opened(odd, PART, "predictor.quality=fast")
    assert prepared(source, store, config) == config


def test_a_dial_that_could_not_be_measured_leaves_a_usable_store(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shadow is there the next time; an interruption is one."""
    source, store, config = opened(checkpoint, PART)
    monkeypatch.setattr(launch, "run_module", lambda *_: 1)
    assert prepared(source, store, config).predictor.quality == "exact"
    assert "runs exactly: its dial could not be measured" in capsys.readouterr().err
    made = shadows.path_of(store).stat().st_mtime_ns

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, store, config)
    assert shadows.path_of(store).stat().st_mtime_ns == made
    assert not (store.path / DIAL).exists()


def test_a_budget_without_room_for_the_shadow_is_for_the_exact_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured then."""
    from pipeline.planner.divide import least

    source, store, config = opened(checkpoint)
    needed = least(store, config).total
    monkeypatch.setattr(launch, "run_module", lambda *_: pytest.fail("something was measured"))
    source, store, config = opened(checkpoint, f"memory.budget={needed + 4096}B")
    assert prepared(source, store, config).predictor.quality == "exact"


def test_fewer_tokens_are_measured_where_the_machine_is_slow(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store, _ = opened(checkpoint)
    found = []
    for rate in (1e15, 1e6):
        monkeypatch.setattr(first_dial, "_rate", lambda rate=rate: rate)
        found.append(first_dial._effort(store))
    quick, slow = found
    assert (quick.held_out, slow.held_out) == (first_dial.HELD_OUT[0], first_dial.HELD_OUT[-1])
    assert quick.minutes < slow.minutes
