"""Trained predictors: which maps of a file are used, what they score, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import predictors
import pytest
from stores import bundle_store

from pipeline.ring.plan import Forecast
from storage.errors import StoreError
from storage.store import Store
from workers.predictor import lowrank

LAYERS = range(3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return bundle_store(tmp_path / "store")


def hidden(store: Store) -> np.ndarray:
    return np.random.default_rng(9).normal(size=store.architecture.d_model).astype(np.float32)


def expected(tensors: dict, prefix: str, layer: int, x: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    parts = {
        name: tensors[f"{prefix}.{layer}.{name}"].astype(np.float64)
        for name in ("down", "up", "bias", "scale")
    }
    return parts["up"] @ (parts["down"] @ (x * parts["scale"])) + parts["bias"] > threshold


def both(store: Store) -> dict:
    return predictors.maps(store, "layers", LAYERS) | predictors.maps(
        store, "inlayer", LAYERS, rank=5, seed=2
    )


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_guesses_and_sets_use_their_own_maps(store, threshold):
    tensors = both(store)
    predictors.write(store, tensors)
    scorer = lowrank.load(store, "default", Forecast("lowrank", 1, True), threshold)
    x = hidden(store)
    for layer in LAYERS:
        for own, prefix in ((False, "layers"), (True, "inlayer")):
            mask = scorer.active(layer, x, own)
            assert mask.tolist() == expected(tensors, prefix, layer, x, threshold).tolist()
    assert scorer.notes == ()


@pytest.mark.parametrize("name", ["layers.1.bias", "layers.1.scale"])
def test_numbers_that_are_none_are_refused(store, name):
    tensors = both(store)
    tensors[name][0] = np.nan
    predictors.write(store, tensors)
    with pytest.raises(StoreError, match=r"is damaged: layers\.1 holds numbers that are none"):
        lowrank.load(store, "default", Forecast("lowrank", 1, True), 0.0)


def test_maps_may_share_the_matrices_of_the_layers_own(store):
    tensors = both(store)
    for layer in LAYERS:
        for name in ("down", "up"):
            tensors[f"layers.{layer}.{name}"] = tensors[f"inlayer.{layer}.{name}"]
    whole = predictors.write(store, tensors, name="whole").stat().st_size
    repeated = [name for name in tensors if name.startswith("layers.") and name.endswith(("down", "up"))]
    left = {name: tensor for name, tensor in tensors.items() if name not in repeated}
    assert predictors.write(store, left, name="left").stat().st_size < 0.7 * whole
    x = hidden(store)
    scorer = lowrank.load(store, "left", Forecast("lowrank", 1, True), 0.0)
    for layer in LAYERS:
        assert scorer.active(layer, x, False).tolist() == expected(tensors, "layers", layer, x).tolist()
        assert scorer.maps[False][layer].up is scorer.maps[True][layer].up


def test_doubtful_neurons_are_told_apart(store):
    tensors = both(store)
    for layer in LAYERS:
        tensors[f"inlayer.{layer}.resident"] = np.array([-0.6], np.float32)
        tensors[f"inlayer.{layer}.absent"] = np.array([0.9], np.float32)
    predictors.write(store, tensors)
    x = hidden(store)
    scorer = lowrank.load(store, "default", Forecast("lowrank", 1, True, cache_aware=True), 0.2)
    plain = lowrank.load(store, "default", Forecast("lowrank", 1, True), 0.2)
    for layer in LAYERS:
        certain, doubtful = scorer.wanted(layer, x, True)
        assert 0 < doubtful.size < doubtful.size + certain.size
        ids = np.sort(np.concatenate((certain, doubtful)))
        assert ids.tolist() == np.flatnonzero(expected(tensors, "inlayer", layer, x, 0.2 - 0.6)).tolist()
        sure = np.flatnonzero(expected(tensors, "inlayer", layer, x, 0.2 + 0.9))
        assert certain.tolist() == sure.tolist()
        for one, own in ((scorer, False), (plain, True)):  # guesses have no doubts
            certain, doubtful = one.wanted(layer, x, own)
            assert certain.tolist() == np.flatnonzero(plain.active(layer, x, own)).tolist()
            assert doubtful.size == 0


def test_guesses_have_a_threshold_of_their_own(store):
    tensors = both(store)
    for layer in LAYERS:
        tensors[f"layers.{layer}.guess"] = np.array([0.8], np.float32)
    predictors.write(store, tensors)
    x = hidden(store)
    scorer = lowrank.load(store, "default", Forecast("lowrank", 1, True), 0.1)
    assert scorer.active(2, x, False).tolist() == expected(tensors, "layers", 2, x, 0.9).tolist()
    scorer = lowrank.load(store, "default", Forecast("lowrank", 1, False), 0.1)
    assert scorer.active(2, x, False).tolist() == expected(tensors, "layers", 2, x, 0.1).tolist()


def test_weights_stay_in_sixteen_bits(store):
    predictors.write(store, both(store))
    file = lowrank.open_file(store, "default")
    one = lowrank.LowRank.read(file, "layers.0", store.layout.most_units, store.architecture.d_model)
    assert (one.down.dtype, one.up.dtype, one.bias.dtype) == (np.uint16, np.uint16, np.float32)


def test_without_maps_for_the_guess_the_layers_own_are_used(store):
    tensors = predictors.maps(store, "inlayer", LAYERS)
    predictors.write(store, tensors)
    scorer = lowrank.load(store, "default", Forecast("lowrank", 2, True), 0.0)
    x = hidden(store)
    assert scorer.active(1, x, False).tolist() == expected(tensors, "inlayer", 1, x).tolist()
    assert "look-ahead" in scorer.notes[0]


def test_a_file_of_lookahead_0_holds_the_layers_own_maps(store):
    tensors = predictors.maps(store, "layers", LAYERS)
    predictors.write(store, tensors, changes={"lookahead": "0"})
    scorer = lowrank.load(store, "default", Forecast("lowrank", 0, False), 0.0)
    x = hidden(store)
    assert scorer.active(2, x, True).tolist() == expected(tensors, "layers", 2, x).tolist()


def test_early_sets_need_only_maps_of_their_lookahead(store):
    tensors = predictors.maps(store, "layers", LAYERS)
    predictors.write(store, tensors, changes={"lookahead": "2"})
    scorer = lowrank.load(store, "default", Forecast("lowrank", 2, False), 0.0)
    x = hidden(store)
    assert scorer.active(2, x, False).tolist() == expected(tensors, "layers", 2, x).tolist()


def test_in_a_prefill_of_lookahead_0_the_layers_own_maps_look_ahead(store):
    tensors = predictors.maps(store, "inlayer", LAYERS)
    predictors.write(store, tensors)
    scorer = lowrank.load(store, "default", Forecast("lowrank", 0, False), 0.0)
    x = hidden(store)
    assert scorer.active(1, x, False).tolist() == expected(tensors, "inlayer", 1, x).tolist()


def test_layers_that_need_none_may_be_absent(store):
    predictors.write(store, predictors.maps(store, "inlayer", range(1, 3)))
    with pytest.raises(StoreError, match="no map for look-ahead 0 of layer 0"):
        lowrank.load(store, "default", Forecast("lowrank", 1, True), 0.0)
    lowrank.load(store, "default", Forecast("lowrank", 1, True, pinned=frozenset({0})), 0.0)


@pytest.mark.parametrize(
    ("metadata", "lookahead", "refines", "message"),
    [
        ({"store": "f" * 32}, 1, False, "trained for other weights"),
        ({"kind": "forest"}, 1, False, "not a file of low-rank predictors"),
        ({}, 2, False, "no map for look-ahead 2 of layer 0"),
        ({}, 0, False, "no map for look-ahead 0 of layer 0"),
        ({}, 1, True, "no map for look-ahead 0 of layer 0"),
    ],
)
def test_refused(store, metadata, lookahead, refines, message):
    predictors.write(store, predictors.maps(store, "layers", LAYERS), changes=metadata)
    with pytest.raises(StoreError, match=message) as caught:
        lowrank.load(store, "default", Forecast("lowrank", lookahead, refines), 0.0)
    assert "train-predictor" in str(caught.value)


def test_a_missing_file_names_the_command_that_makes_it(store):
    with pytest.raises(StoreError, match=r"no predictors named other: .*train-predictor"):
        lowrank.load(store, "other", Forecast("lowrank", 1, True), 0.0)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        ("layers.1.up", (96, 4), np.float16, r"layers.1.up as \(96, 4\), not \(96, 3\)"),
        ("layers.1.down", (3, 64), np.float16, r"not \(rank, 128\)"),
        ("layers.1.up", (96, 3), np.float32, "as float32, not float16"),
        ("layers.1.bias", (95,), np.float32, r"not \(96,\)"),
        ("layers.1.bias", (96,), np.int64, "as I64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(store, name, shape, kind, message):
    tensors = predictors.maps(store, "layers", LAYERS)
    predictors.write(store, {**tensors, name: np.zeros(shape, kind)})
    with pytest.raises(StoreError, match=message):
        lowrank.load(store, "default", Forecast("lowrank", 1, False), 0.0)


@pytest.mark.parametrize("keep", [0, 5, 40, -10])
def test_a_truncated_file_is_refused(store, keep):
    path = predictors.write(store, predictors.maps(store, "layers", LAYERS))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        StoreError, match=r"is truncated (or not a safetensors file|\(layers\.2\.up ends beyond)"
    ):
        lowrank.load(store, "default", Forecast("lowrank", 1, False), 0.0)
