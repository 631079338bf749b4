"""The oracle's sets against products in double precision, and what is predicted of a prompt."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.ring.messages import EMBEDDING, HiddenReady, NeuronsPredicted, Step
from pipeline.ring.plan import Forecast, Plan
from storage.codecs import CODECS, FLOAT32
from storage.layout import Rows
from storage.store import Decider
from workers.predictor.oracle import Oracle
from workers.predictor.prediction import Prediction
from workers.predictor.scorer import Scorer

LAYERS, D_FF, D_MODEL = 3, 40, 16


def weights(dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random up-projections in their carrier type, and the same as float64."""
    generator = np.random.default_rng(3)
    exact = [
        generator.normal(size=(D_FF, D_MODEL)).astype(np.float16).astype(np.float32) for _ in range(LAYERS)
    ]
    if dtype == "bfloat16":
        carried = [(one.view(np.uint32) >> 16).astype(np.uint16) for one in exact]
        return carried, [(one.astype(np.uint32) << 16).view(np.float32).astype(float) for one in carried]
    if dtype == "float16":
        return [one.astype(np.float16).view(np.uint16) for one in exact], [one.astype(float) for one in exact]
    return exact, [one.astype(float) for one in exact]


@pytest.fixture
def hidden() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(1 + LAYERS, 3, D_MODEL)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_oracle_finds_the_active_neurons(dtype, biased, hidden):
    carried, exact = weights(dtype)
    bias = np.linspace(-3, 3, D_FF, dtype=np.float32) if biased else np.zeros(0, np.float32)
    oracle = Oracle([[Decider(Rows.of_matrix(one, CODECS[dtype]), bias)] for one in carried])
    x = hidden[1, 0]
    scores = exact[1] @ x + (bias if biased else 0)
    mask = oracle.active(1, x, own=True)
    assert mask[scores > 0].all()
    assert not mask[scores < -0.1].any()
    assert 0 < mask.sum() < D_FF


def test_a_neuron_within_rounding_of_zero_is_taken():
    up = np.array([[1.0, -1.0], [5.0, 1.0], [-1.0, 0.0]], np.float32)
    oracle = Oracle([[Decider(Rows.of_matrix(up, FLOAT32), np.zeros(0, np.float32))]])
    assert oracle.active(0, np.array([1.0, 1.000001], np.float32), own=True).tolist() == [True, True, False]


class OneOfLayer(Scorer):
    """Predicts neuron `layer` always, `10 + own` likewise, and the neuron that the row names."""

    notes = ()

    def active(self, layer: int, hidden: np.ndarray, own: bool) -> np.ndarray:
        mask = np.zeros(D_FF, np.bool_)
        mask[[layer, 10 + own, int(hidden[0])]] = True
        return mask


def prediction(
    forecast: Forecast, rows: np.ndarray, scorer: OneOfLayer | None
) -> tuple[Prediction, np.ndarray]:
    predicted = np.full((LAYERS, 2, D_FF), -1, np.int32)
    plan = Plan(D_MODEL, (D_FF,) * LAYERS, 512, (1,) * LAYERS, 1, 16, 3, forecast)
    return Prediction(plan, scorer, rows, predicted), predicted


TOKEN, PROMPT = Step(9, 30, 1, every=False), Step(9, 0, 2, every=True)


def test_a_set_and_a_guess_go_to_their_own_rows(hidden):
    hidden[1, 0, 0] = 30
    under_test, predicted = prediction(Forecast("lowrank", 1, True), hidden, OneOfLayer())
    assert list(under_test.handle(HiddenReady(5, TOKEN, 0, 1, 26))) == [
        NeuronsPredicted(5, TOKEN, 0, False, every=False, certain=3, doubtful=0, keep=None, done=26),
        NeuronsPredicted(5, TOKEN, 1, True, every=False, certain=3, doubtful=0, keep=None, done=26),
    ]
    assert predicted[0, 0, :3].tolist() == [0, 11, 30]
    assert predicted[1, 1, :3].tolist() == [1, 10, 30]
    assert (predicted[0, 1] == -1).all()
    stats = under_test.stats()
    assert (stats["calls"], stats["layer.0.predicted"], stats["layer.1.predicted"]) == (1, 3, 0)


def test_a_prefill_wants_everything_and_keeps_the_union_over_its_rows(hidden):
    hidden[0, :, 0] = [20, 25, 35]
    under_test, predicted = prediction(Forecast("lowrank", 1, True), hidden, OneOfLayer())
    assert list(under_test.handle(HiddenReady(5, PROMPT, EMBEDDING, 2, 26))) == [
        NeuronsPredicted(5, PROMPT, 0, False, every=True, certain=0, doubtful=0, keep=4, done=26)
    ]
    assert predicted[0, 0, :4].tolist() == [0, 10, 20, 25]


@pytest.mark.parametrize("step", [TOKEN, PROMPT])
def test_all_and_pinned_layers_keep_everything(hidden, step):
    everything = [NeuronsPredicted(5, step, 1, False, every=True, certain=0, doubtful=0, keep=None, done=3)]
    of_all, _ = prediction(Forecast("all", 1, False), hidden, None)
    pinned, _ = prediction(Forecast("lowrank", 1, False, pinned=frozenset({1})), hidden, OneOfLayer())
    message = HiddenReady(5, step, 0, 1, 3)
    assert list(of_all.handle(message)) == everything
    assert list(pinned.handle(message)) == everything
    assert of_all.stats()["layer.1.predicted"] == (0 if step.every else D_FF)
