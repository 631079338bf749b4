"""One dial for every model: what each word stands for, and where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import test_shadow
from checkpoints import write_checkpoint
from predictors import maps, write
from ring import config

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.planner.resolve import resolve
from pipeline.quality import FULL_ROWS, WORDS, check_word, describe, in_words
from pipeline.ring.plan import Plan
from storage import shadow as shadows
from storage.convert import convert
from storage.dial import DIAL, Dial, DialLayer, DialPoint, Others, Text, Thresholds, write_dial
from storage.errors import ConfigError, UsageError
from storage.shadow import Shadow
from storage.store import Store
from workers.compute.cpu.shadow import CpuShadow, read
from workers.compute.weights import Weights


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return test_shadow.make_store(tmp_path_factory.mktemp("falcon"), "falcon-7b")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("opt")
    store = convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="o")
    write(store, maps(store, "layers", range(len(store.layout.layers))))
    return store


def chosen(store: Store, word: str, **sections: dict[str, object]) -> Config:
    predictor = {"quality": word, **sections.pop("predictor", {})}
    return resolve(store, Config.parse({"predictor": predictor, **sections})).config


@pytest.mark.parametrize("word", FULL_ROWS)
def test_a_model_without_zeros_has_a_shadow_and_some_full_rows(falcon, word):
    forecast = resolve(falcon, Config.parse({"predictor": {"quality": word}})).forecast
    assert forecast.shadowed
    assert forecast.full_rows == FULL_ROWS[word]
    assert list(FULL_ROWS.values()) == sorted(FULL_ROWS.values(), reverse=True)


def test_exact_is_every_neuron(falcon, sparse):
    for store in (falcon, sparse):
        assert resolve(store, Config.parse({"predictor": {"quality": "exact"}})).forecast.every


def test_a_sparse_model_has_its_thresholds(sparse):
    high, fast = (chosen(sparse, word).predictor for word in ("high", "fast"))
    assert high.kind == fast.kind == "lowrank"
    assert high.threshold < Config().predictor.threshold < fast.threshold
    preset = {"threshold": -0.5}
    assert chosen(sparse, "balanced", predictor=preset).predictor.threshold == -0.5
    with pytest.raises(ConfigError, match="there is no quality small of o, which is sparse"):
        chosen(sparse, "small")


def test_a_mixture_prefers_what_is_in_memory(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe-dense-layer", "bfloat16")
    store = convert(checkpoint, tmp_path / "store", name="mixture")
    found = [chosen(store, word).experts.prefer for word in ("exact", "high", "balanced", "fast")]
    assert found == sorted(found)
    assert found[0] == 0 < found[1]
    exact = chosen(store, "exact", experts={"per_token": 1})
    assert exact.experts.per_token == 0
    assert exact.predictor.kind == "router"
    with pytest.raises(ConfigError, match="which is a mixture of experts, whose smallest form"):
        chosen(store, "small")


def test_a_store_without_a_shadow_says_how_to_make_one(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama", "bfloat16")
    store = convert(checkpoint, tmp_path / "store", name="plain")
    with pytest.raises(ConfigError, match="no quality fast of plain, which has no shadow: make one with"):
        chosen(store, "fast")
    low = convert(checkpoint, tmp_path / "low", name="low", bits=4)
    with pytest.raises(ConfigError, match="no quality fast of low, which has few bits already"):
        chosen(low, "fast")


def test_what_is_resolved_stays_so(falcon):
    for word in WORDS:
        found = chosen(falcon, word)
        assert resolve(falcon, found).config == found
        assert plan(falcon, found).config.predictor == found.predictor


def test_a_quality_is_told_in_words(falcon):
    assert in_words(falcon, chosen(falcon, "fast")) == ("FFN in q4, but for 3 % of its neurons",)
    assert in_words(falcon, chosen(falcon, "small")) == ("FFN in q4",)
    assert "nothing is read" in describe(falcon, chosen(falcon, "small"))
    assert not in_words(falcon, chosen(falcon, "exact"))
    assert not describe(falcon, config(predictor={"kind": "all", "refine": None}))


@pytest.fixture
def dialled(falcon: Store) -> Iterator[Store]:
    """The store with a measured dial: two points that the ring has, and one that it has not."""

    def point(name: str, share: float, others: Others = "low") -> DialPoint:
        return DialPoint(
            name, others, ("up", "down"), 0.003, 0.001, 0.005, 0.01, 0.05, 0.98, share, 1e6, 1 << 20
        )

    layers, units = len(falcon.layout.layers), falcon.layout.most_units
    points = point("balanced", 0.125), point("small", 0.0), point("fast", 0.05, "mean")
    thresholds = {
        "balanced": np.array([-np.inf, 0.05, np.inf], np.float32),
        "small": np.full(layers, np.inf, np.float32),
        "fast": np.zeros(layers, np.float32),
    }
    write_dial(
        falcon,
        Dial(
            {"up": "q4", "down": "q4"},
            Text("calibration", 1000),
            Text("held-out", 2000),
            "balanced",
            points,
            (DialLayer(*np.zeros((2, units), np.float32), np.zeros(128, np.float32)),) * layers,
            {name: Thresholds(one, one) for name, one in thresholds.items()},
        ),
    )
    yield falcon
    (falcon.path / DIAL).unlink()


def test_a_measured_dial_decides_where_nobody_does(dialled):
    found = resolve(dialled, Config())
    assert found.config.predictor.quality == "balanced"
    assert found.forecast.shadowed
    assert found.forecast.full_rows == 0.125
    assert found.forecast.thresholds[0] == -np.inf
    assert found.forecast.thresholds[2] == np.inf
    assert "perplexity +0.30% (+0.10% to +0.50%) on 2,000 tokens of held-out" in describe(
        dialled, found.config
    )
    assert resolve(dialled, Config.parse({"predictor": {"kind": "all"}})).forecast.every
    assert resolve(dialled, Config.parse({"predictor": {"quality": "small"}})).forecast.low
    # One that the ring cannot run is not taken for measured.
    assert "not measured" in describe(dialled, chosen(dialled, "fast"))


def test_a_torch_device_has_no_shadow(dialled, falcon):
    elsewhere = Config.parse({"compute": {"device": "torch-cpu"}})
    assert resolve(dialled, elsewhere).forecast.every
    with pytest.raises(ConfigError, match=r"compute\.device cpu, not torch-cpu"):
        chosen(falcon, "fast", compute={"device": "torch-cpu"})


def test_a_plan_keeps_its_thresholds(dialled):
    divided = plan(dialled, Config()).plan
    assert Plan.from_json(json.loads(json.dumps(divided.to_json()))) == divided


def test_a_score_above_the_threshold_is_chosen(dialled):
    forecast = resolve(dialled, Config()).forecast
    layers = read(Shadow.open(dialled))
    low = CpuShadow(Weights(dialled), layers, forecast, 1)
    try:
        x = np.random.default_rng(1).normal(size=(1, 128)).astype(np.float32)
        units = dialled.layout.most_units
        counts = [low.choose(index, x).certain.size for index in range(3)]
        assert counts[0] == units
        assert 0 < counts[1] < units
        assert counts[2] == 0
        rows = test_shadow.Rows(dialled, 1)
        scores = np.abs(rows.activations(x[0], rows.low)) * rows.lengths
        sure = np.abs(scores - 0.05) > 1e-3  # products of one token are rounded
        chosen_units = np.isin(np.arange(units), low.choose(1, x).certain)
        assert np.array_equal(chosen_units[sure], scores[sure] > 0.05)
    finally:
        low.close()


def test_a_dial_of_another_copy_is_not_taken(dialled):
    try:
        shadows.write(dialled, 8)
        assert resolve(dialled, Config()).forecast.every
        assert chosen(dialled, "balanced").predictor.full_rows == FULL_ROWS["balanced"]
    finally:
        shadows.write(dialled, 4)


def test_a_word_that_is_none_is_refused():
    assert check_word("") == ""
    with pytest.raises(UsageError, match="exact, high, balanced, fast, small, not 'best'"):
        check_word("best")
