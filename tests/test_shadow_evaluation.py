"""What evaluation scores of a model with a shadow is what the ring computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ring import config, plan_for
from test_shadow import TOKENS, make_store, settings

from pipeline.config import Config
from storage.store import Store
from workers import kernels
from workers.compute.weights import Weights
from workers.lab.evaluation.points import measure
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.forward import forward
from workers.lab.offline.local_ring import LocalRing


@pytest.fixture(scope="module", params=["falcon-7b", "llama"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("shadow"), request.param)


@pytest.mark.parametrize(("share", "changes"), [(0.0, {}), (0.15, {}), (0.15, {"pinned_layers": (1,)})])
def test_every_token_has_its_own_sets(store, share, changes, monkeypatch):
    monkeypatch.setattr(kernels.ACTIVATIONS, "exact", True)
    chosen = settings(share, **changes)
    with torch.no_grad(), DenseModel(store, 1) as model:
        x = forward(model, np.array([[2, *TOKENS]]), make_chooser(store, chosen, in_order=True))
        scored = model.logits(x)[0].numpy()
    units = [store.read_layer(index) for index in range(len(store.layout.layers))]
    with LocalRing(store, chosen, plan_for(store, chosen), Weights(store), units, threads=1) as ring:
        computed = [ring.prefill([2])[0], *(ring.step(at, token) for at, token in enumerate(TOKENS, 1))]
    np.testing.assert_allclose(scored, np.stack(computed), rtol=2e-4, atol=2e-4)


def test_points_of_the_dial_are_compared(store):
    rows = np.random.default_rng(5).integers(3, 300, (3, 40))
    words = ("exact", "high", "fast", "small")
    base = config(predictor={"kind": "auto", "refine": None, "lookahead": 1})
    points = [
        (word, Config.parse(base.replace(predictor={"quality": word}).model_dump(exclude_unset=True)), ())
        for word in words
    ]
    with torch.no_grad(), DenseModel(store, 1) as model:
        exact, high, fast, small = measure(model, points, rows, seed=0)
    assert exact.ratio.value == 1
    assert exact.bytes_per_token > high.bytes_per_token > fast.bytes_per_token > small.bytes_per_token == 0
    assert exact.agreement.value > high.agreement.value > small.agreement.value
    assert high.predicted == pytest.approx(0.2, abs=0.02)
