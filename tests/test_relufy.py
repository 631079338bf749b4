"""relufy: the swap, a run that is stopped and goes on, few parameters in the place of all, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from storage.convert import convert
from storage.errors import UsageError
from workers.lab.offline.dense import DenseModel
from workers.lab.relufy import train as trainer
from workers.lab.relufy.__main__ import run
from workers.lab.relufy.lora import Adapted, adapt, merge
from workers.lab.relufy.measure import Measured, measure
from workers.lab.relufy.network import Network
from workers.lab.relufy.train import Recipe, train

RECIPE = Recipe(
    steps=6,
    tokens=64,
    length=16,
    rate=1e-3,
    kl=1.0,
    layers=1.0,
    zeros=0.9,
    control=False,
    lora=0,
    seed=3,
)
KINDS = ("falcon-7b", "llama")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "source", request.param, "float32")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).integers(5, 250, (12, 17))


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    return dict(Network.open(directory, "cpu").model.state_dict())


def changed(**changes: object) -> Recipe:
    return Recipe(**{**{name: getattr(RECIPE, name) for name in RECIPE.__slots__}, **changes})  # type: ignore[arg-type]


def test_the_swapped_model_is_what_a_store_of_it_computes(
    checkpoint: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    """Its checkpoint says ReLU, converts, is sparse, and gives the same logits; zeros are exact."""
    network = Network.open(checkpoint, "cpu").swap()
    network.write(checkpoint, tmp_path / "relu")
    store = convert(tmp_path / "relu", tmp_path / "store", name="relu")
    assert store.architecture.sparse
    assert {layer.ffn.activation for layer in store.architecture.layers} == {"relu"}
    with torch.no_grad(), DenseModel(store, 1) as dense:
        ours = network.head(network.hidden(torch.from_numpy(rows[:2, :-1])))
        theirs = dense.forward(rows[:2, :-1])
    torch.testing.assert_close(ours, theirs.view_as(ours), atol=1e-3, rtol=1e-3)
    found = measure(tmp_path / "relu", rows, "cpu")
    assert all(0.2 < share < 0.8 for share in found.zeros)
    assert all(0 <= share < 1 for share in found.dead)
    assert max(measure(checkpoint, rows, "cpu").zeros) < 0.01


def test_a_run_lowers_its_loss_and_the_share_of_what_is_not_zero(
    checkpoint: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    seen = []
    long = changed(steps=40, rate=3e-3)
    train(checkpoint, rows, long, tmp_path, progress=lambda *one: seen.append(one))
    assert [done for done, _, _ in seen] == list(range(1, 41))
    assert np.mean([terms.loss for _, terms, _ in seen[-5:]]) < np.mean(
        [terms.loss for _, terms, _ in seen[:5]]
    )
    assert np.mean(seen[-1][2]) < 0.7 * np.mean(seen[0][2])


class Killed(Exception):
    pass


@pytest.mark.parametrize("lora", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_weights(
    checkpoint: Path, rows: np.ndarray, tmp_path: Path, lora: int
) -> None:
    def stop(done: int, *_: object) -> None:
        if done == 5:  # one step behind what was saved last
            raise Killed

    recipe = changed(lora=lora)
    train(checkpoint, rows, recipe, tmp_path / "whole", save_every=2)
    with pytest.raises(Killed):
        train(checkpoint, rows, recipe, tmp_path / "stopped", save_every=2, progress=stop)
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    train(checkpoint, rows, recipe, tmp_path / "stopped", save_every=2)
    ones, others = (parameters(tmp_path / name / "checkpoint") for name in ("whole", "stopped"))
    assert all(torch.equal(ones[name], others[name]) for name in ones)
    before = parameters(checkpoint)
    moved = [name for name in ones if not torch.equal(ones[name], before[name])]
    assert moved
    if lora:
        assert not any("norm" in name or "embed" in name for name in moved)


def test_a_run_of_other_settings_is_not_gone_on_with(
    checkpoint: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    train(checkpoint, rows, changed(steps=1), tmp_path)
    with pytest.raises(UsageError, match="was begun with another steps"):
        train(checkpoint, rows, RECIPE, tmp_path)
    trained = tmp_path / "checkpoint"
    with pytest.raises(UsageError, match="has ReLU already"):
        train(trained, rows, RECIPE, tmp_path / "again")


def test_a_control_keeps_its_activation(checkpoint: Path, rows: np.ndarray, tmp_path: Path) -> None:
    """Without a first distance to the original: only the text moves it."""
    seen = []
    control = changed(control=True, steps=2)
    trained = train(checkpoint, rows, control, tmp_path, progress=lambda *one: seen.append(one))
    assert seen[0][1].divergence == pytest.approx(0, abs=1e-6)
    assert seen[0][1].error == pytest.approx(0, abs=1e-6)
    assert json.loads((trained / "config.json").read_text()) == Network.open(checkpoint, "cpu").config


def test_every_row_comes_once_before_any_comes_again(rows: np.ndarray) -> None:
    some = np.concatenate([trainer._batch(rows, RECIPE, step) for step in range(3)])
    assert RECIPE.rows == 4
    assert sorted(map(tuple, some.tolist())) == sorted(map(tuple, rows.tolist()))
    assert not np.array_equal(some, rows)


def test_an_adapter_merged_is_the_same_model(checkpoint: Path, rows: np.ndarray) -> None:
    network, ids = Network.open(checkpoint, "cpu"), torch.from_numpy(rows[:1, :-1])
    with torch.no_grad():
        before = network.hidden(ids)
        adapt(network.decoder, 2)
        assert torch.equal(network.hidden(ids), before)
        for module in network.decoder.modules():
            if isinstance(module, Adapted):
                module.up.add_(0.1)
        apart = network.hidden(ids)
        assert not torch.allclose(apart, before)
        merge(network.decoder)
        torch.testing.assert_close(network.hidden(ids), apart, atol=1e-4, rtol=1e-4)


def test_perplexities_are_compared_row_by_row() -> None:
    one, other = (Measured(nats, 10, [0.5], [0.0]) for nats in ([20.0, 30.0], [19.0, 29.0]))
    assert one.perplexity == pytest.approx(np.exp(2.5))
    assert one.beside(other).value == pytest.approx(np.exp(0.1) - 1)


def test_the_command(checkpoint: Path, tmp_path: Path, here: Callable[..., object]) -> None:
    """A control, and a run beside it; its own words for what cannot be."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number * 7919 % 101} and" for number in range(400)))
    options = ("--text", text, "--steps", "2", "--tokens", "64", "--length", "32", "--test-tokens", "96")
    done = here(run, checkpoint, tmp_path / "control", *options, "--control")
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    done = here(run, checkpoint, tmp_path / "tuned", *options, "--beside", tmp_path / "control")
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert "control: perplexity" in done.stdout  # type: ignore[attr-defined]
    assert "step 2/2" in done.stderr  # type: ignore[attr-defined]
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert len(report["tuned"]["zeros"]) == 3
    done = here(run, checkpoint, tmp_path / "x", *options, "--beside", tmp_path / "none")
    assert done.returncode == UsageError.exit_code  # type: ignore[attr-defined]
    assert "let that run end first" in done.stderr  # type: ignore[attr-defined]
