"""Errors over ranks and thresholds: exact counts, a file's curves, wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch

from pipeline import ending
from storage.convert import convert
from storage.errors import UsageError
from storage.store import Store
from workers.lab.training import frontier
from workers.lab.training.activations import Samples
from workers.lab.training.lowmap import LowMap
from workers.lab.training.report import Counts


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    where = tmp_path_factory.mktemp("frontier")
    return convert(checkpoints.write_checkpoint(where / "checkpoint", "opt"), where / "store", name="tiny")


def test_every_offset_is_counted_as_a_threshold_of_its_own() -> None:
    generator = np.random.default_rng(0)
    made = LowMap(torch.randn(3, 8), torch.randn(20, 3), torch.randn(20))
    inputs = generator.standard_normal((1500, 8)).astype(np.float16)  # more than one block
    active = generator.random((1500, 20)) < 0.2
    samples = Samples(inputs, np.packbits(active, axis=1, bitorder="little"), 20, 1.0)
    passing = frontier.Passing()
    passing.see(made, samples)
    curve = passing.curve(1, 3, 0.1)
    scores = made.scores(torch.from_numpy(inputs.astype(np.float32)))
    for index in (0, 90, 120, 161, 240):
        wanted = Counts.of(scores > frontier.OFFSETS[index], torch.from_numpy(active))
        assert curve.false_negatives[index] == pytest.approx(wanted.false_negatives)
        assert curve.false_positives[index] == pytest.approx(wanted.false_positives)
    assert 0.02 < curve.false_negatives[60] < curve.false_negatives[120] < 0.98


def test_the_price_lies_between_the_neighbours() -> None:
    curve = frontier.Curve(0, 4, 0.1, (0.0, 0.04, 0.08), (0.9, 0.3, 0.1))
    assert curve.price(0.05) == pytest.approx(0.25)


def test_more_rank_costs_less_and_a_picture_shows_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(2)
    words = generator.choice(["one", "cat", "sat", "mat", "and", "then", "sun"], 3000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    picture = tmp_path / "frontier.png"
    arguments = ["--store", str(store.path), "--text", str(tmp_path / "text.txt"), "--threads", "1"]
    arguments += ["--ranks", "4,48", "--method", "regression", "--picture", str(picture), "--json"]
    before = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["frontier", *arguments])
    try:
        assert frontier.run() == 0
    finally:
        torch.set_num_threads(before)
    curves = [frontier.Curve(**one) for one in json.loads(capsys.readouterr().out)["curves"]]
    assert [(one.lookahead, one.rank) for one in curves] == [(0, 4), (0, 48), (1, 4), (1, 48)]
    assert curves[1].price(0.05) < 0.7 * curves[0].price(0.05)
    assert curves[1].price(0.05) < curves[3].price(0.05)  # its own input tells more than an earlier one
    assert picture.stat().st_size > 10_000
    assert not store.path.with_name("store.frontier").exists()


@pytest.mark.parametrize(("option", "value"), [("--ranks", "0"), ("--ranks", "a,b"), ("--lookaheads", "3")])
def test_wrong_numbers_are_one_sentence(store, monkeypatch, capsys, option, value):
    monkeypatch.setattr("sys.argv", ["frontier", "--store", str(store.path), "--text", "x", option, value])
    assert frontier.run() == ending.WRONG_USE
    assert "no list of whole numbers" in capsys.readouterr().err
    with pytest.raises(UsageError):
        frontier._numbers(value, 1, 2)


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(store, monkeypatch, capsys):
    arguments = ["--store", str(store.path), "--text", "x", "--picture", "/nowhere/frontier.png"]
    monkeypatch.setattr("sys.argv", ["frontier", *arguments])
    assert frontier.run() == ending.WRONG_USE
    assert "there is no directory /nowhere" in capsys.readouterr().err
