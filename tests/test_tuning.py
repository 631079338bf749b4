"""The search of `run.py tune`: with measurements that are made up, and once with a ring."""

from __future__ import annotations

import random
import statistics
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from ring import config as ring_config
from stores import bundle_store
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.tuning.document import document, line_of
from pipeline.tuning.knobs import Knob, Settings, changed, knobs, start
from pipeline.tuning.search import MARGIN, Compared, Outcome, Tried, search
from pipeline.tuning.trial import FEWEST, SLOW_TOKENS, Text
from storage.convert import convert
from storage.errors import ConfigError, UsageError

KNOBS = (Knob("prefetcher.readers", (1, 2, 4)), Knob("prefetcher.queue_depth", (16, 64, 128)))
BEGINNING = {"prefetcher.readers": 1, "prefetcher.queue_depth": 128}


def clock(trials: int) -> tuple[Callable[[Settings], None], Callable[[], float]]:
    """Counts a second for every trial, of so many in all."""
    spent = [0.0]

    def tick(_: Settings) -> None:
        spent[0] += 1

    return tick, lambda: trials - spent[0]


def sought(cost: Callable[[Settings], float], trials: int = 1000) -> Outcome:
    tick, left = clock(trials)

    def measure(chosen: Settings) -> float:
        tick(chosen)
        return cost(chosen)

    return search(KNOBS, BEGINNING, measure, left)


def test_the_quickest_neighbours_are_found() -> None:
    costs = {(1, 128): 10.0, (2, 128): 8.0, (4, 128): 9.0, (2, 64): 7.0, (2, 16): 12.0}
    found = sought(
        lambda one: costs.get((int(one["prefetcher.readers"]), int(one["prefetcher.queue_depth"])), 20.0)
    )
    assert found.changes == {"prefetcher.readers": 2, "prefetcher.queue_depth": 64}
    assert found.last.better
    assert statistics.median(found.last.after) == 7.0


def test_what_is_hardly_quicker_is_not_taken() -> None:
    found = sought(lambda one: 10.0 - (MARGIN * 5 if one["prefetcher.readers"] == 2 else 0))
    assert found.changes == {}
    assert not any(one.taken for one in found.tried)


def timed(seconds: float, first: float, each: float, cost: Callable[[Settings], float]) -> Outcome:
    """A search that has `seconds`, of which the first trial takes `first` and the others `each`."""
    spent: list[float] = []

    def measure(chosen: Settings) -> float:
        spent.append(each if spent else first)
        return cost(chosen)

    return search(KNOBS, BEGINNING, measure, lambda: seconds - sum(spent))


def test_a_first_trial_with_cold_files_does_not_end_the_search() -> None:
    found = timed(160, first=30, each=3, cost=lambda _: 10.0)
    assert found.in_time
    assert {one.key for one in found.tried} == set(BEGINNING)


def test_what_there_is_no_time_to_confirm_is_not_written() -> None:
    found = timed(160, first=30, each=30, cost=lambda one: 10.0 / one["prefetcher.readers"])
    assert [one.taken for one in found.tried] == [True]
    assert not found.in_time
    assert found.changes == {}
    assert found.last.after == ()


def test_a_gain_that_does_not_come_again_is_given_up() -> None:
    """Quick while it is tried, slow in the last comparison."""
    calls = [0]

    def cost(one: Settings) -> float:
        calls[0] += one["prefetcher.readers"] == 2
        return 5.0 if one["prefetcher.readers"] == 2 and calls[0] <= 3 else 10.0

    found = search(KNOBS[:1], BEGINNING, cost, lambda: 1e9)
    assert any(one.taken for one in found.tried)
    assert found.changes == {}
    assert not found.last.better


def test_settings_that_cannot_be_are_passed_over_with_their_reason() -> None:
    def cost(one: Settings) -> float:
        if one["prefetcher.readers"] == 2:
            raise ConfigError("two are too many")
        return 10.0

    found = sought(cost)
    assert [one.refused for one in found.tried if one.value == 2] == ["two are too many"]
    assert "refused, two are too many" in line_of(found.tried[0])


def test_a_beginning_that_cannot_be_ends_the_search() -> None:
    def cost(_: Settings) -> float:
        raise ConfigError("nothing works")

    with pytest.raises(ConfigError, match="nothing works"):
        sought(cost)


@given(st.integers(0, 10_000), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_result_is_never_worse_than_the_beginning_and_time_is_kept(seed: int, trials: int) -> None:
    noise = random.Random(seed)
    base = {(one, two): noise.uniform(5, 15) for one in (1, 2, 4) for two in (16, 64, 128)}
    ran = [0]

    def cost(one: Settings) -> float:
        ran[0] += 1
        key = int(one["prefetcher.readers"]), int(one["prefetcher.queue_depth"])
        return base[key] * noise.uniform(0.8, 1.2)

    found = sought(cost, trials)
    assert ran[0] == found.measured <= max(1, trials) + 1
    if found.changes:
        assert statistics.median(found.last.after) < statistics.median(found.last.before)
    else:
        assert found.settings == found.beginning


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=7))
def test_better_means_in_medians_and_in_most_pairs(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    if Compared(before, after).better:
        assert statistics.median(after) < statistics.median(before)
        assert not Compared(after, before).better
    assert not Compared((), ()).better


def test_knobs_are_those_that_count(tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store")
    short = {"context": 32}
    reads = ring_config(predictor={"kind": "all", "refine": False}, compute=short)
    keys = [one.key for one in knobs(reads, plan(store, reads).plan)]
    assert keys[0] == "predictor.lookahead"
    assert "cache.half_life" not in keys  # every neuron is wanted
    whole = ring_config(predictor={"kind": "all", "refine": False}, cache={"share": 1.0}, compute=short)
    found = knobs(whole, plan(store, whole).plan)
    assert [one.key for one in found] == ["compute.threads"]
    assert start(whole, found)["compute.threads"] in found[0].values


def test_settings_go_into_their_sections() -> None:
    one = changed(Config(), {"prefetcher.readers": 4, "cache.half_life": 8.0})
    assert (one.prefetcher.readers, one.cache.half_life) == (4, 8.0)
    with pytest.raises(ConfigError):
        changed(Config(), {"prefetcher.readers": 0})


def test_the_file_is_a_configuration_with_its_measurements(tmp_path: Path) -> None:
    compared = Compared((2.0, 2.0, 2.0), (1.0, 1.0, 1.0))
    outcome = Outcome(dict(BEGINNING), {**BEGINNING, "prefetcher.readers": 2})
    outcome.tried.append(Tried("prefetcher.readers", 2, compared, taken=True))
    outcome.last = compared
    file = tmp_path / "tuned.toml"
    file.write_text(document(outcome, ["a model"]), encoding="utf-8")
    assert tomllib.loads(file.read_text()) == {"prefetcher": {"readers": 2}}
    assert Config.load(file).prefetcher.readers == 2
    assert "# prefetcher.readers = 2: 1,000.00 beside 2,000.00, taken" in file.read_text()
    assert "50.0% quicker than the beginning" in file.read_text()


def tune(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "there.toml"], "is there already"),
        (["--out", "no/where.toml"], "there is no directory"),
        (["--tokens", "2"], "at least"),
        (["--prompt", ""], "the prompt is empty"),
        (["--model", "opt-6.8b"], "did you mean"),
    ],
)
def test_wrong_use_is_refused_before_the_work(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").write_text("# mine\n")
    with pytest.raises(UsageError, match=words):
        tune(*arguments)
    assert (tmp_path / "there.toml").read_text() == "# mine\n"
    assert not (tmp_path / "tuned.toml").exists()


@pytest.mark.ring
def test_a_ring_is_tuned_and_the_file_is_a_configuration(tmp_path: Path) -> None:
    store = convert(
        write_checkpoint(tmp_path / "model", "opt", "float16"), tmp_path / "store", name="tiny"
    ).path
    out = tmp_path / "tuned.toml"
    share = ["--set", "cache.share=0.25", "--set", "predictor.kind=all"]
    tune("--model", store, *share, "--minutes", "0.3", "--tokens", "6", "--prompt", "a", "--out", out)
    Config.load(out)
    text = out.read_text(encoding="utf-8")
    assert "trials of 6 tokens" in text
    assert ("quicker than the beginning" in text) == (
        tomllib.loads(text) != {}
    ) or "Nothing is quicker" in text
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_a_trial_of_a_slow_model_is_short() -> None:
    written = Text((1, 2), tuple(range(32)), seconds=0.1)
    assert written.within(4) == replace(written, answer=written.answer[:20])
    assert len(written.within(0.5).answer) == FEWEST
    slow = replace(written, seconds=3.0).within(15)
    assert (slow.answer, slow.once) == (tuple(range(SLOW_TOKENS)), True)
