"""docs/extending.md, done: a family, a codec, a policy and a scorer of somebody else's."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from safetensors.numpy import load_file, save_file

from pipeline.config import Cache, Config
from pipeline.ring.messages import HiddenReady, Step
from pipeline.ring.plan import Forecast, Plan
from storage.architecture import Ffn
from storage.codecs import CODECS, FLOAT32, Codec
from storage.convert import convert
from storage.errors import ConfigError
from storage.families.opt import OPT
from storage.families.registry import FAMILIES
from storage.layout import Unit, neuron
from workers.cache.policies import POLICIES, make_policy
from workers.cache.policy import Ids, WindowThenOldest
from workers.cache.residency import Residency
from workers.compute.torch.ffn import TorchFfn
from workers.compute.torch.shelf import Shelf
from workers.compute.torch.weights import Matrix, PlacedLayer
from workers.predictor.prediction import Prediction
from workers.predictor.scorer import F32, Mask, Scorer
from workers.predictor.scorers import SCORERS, load_scorer

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(12))]


@contextmanager
def registered(table: MutableMapping[str, Any], name: str, entry: object) -> Iterator[None]:
    table[name] = entry
    try:
        yield
    finally:
        del table[name]


def test_a_family(tmp_path: Path) -> None:
    """OPT under another name, whose checkpoints call everything `net.…`."""
    toy = replace(OPT, name="toy", prefixes=("net.",))
    model = write_checkpoint(tmp_path / "model", "opt")
    usual = convert(model, tmp_path / "usual", name="opt")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.replace("model.decoder.", "net."): value for name, value in tensors.items()},
        model / "model.safetensors",
    )
    config = (model / "config.json").read_text(encoding="utf-8")
    (model / "config.json").write_text(config.replace('"model_type": "opt"', '"model_type": "toy"'))
    with registered(FAMILIES, "toy", toy):
        store = convert(model, tmp_path / "toy", name="toy")
    with LocalDecoder(store) as decoder, LocalDecoder(usual) as expected:
        assert np.array_equal(decoder.prefill(PROMPT), expected.prefill(PROMPT))


def test_a_codec() -> None:
    """Fixed point in one byte. The compiled loops with such a codec are tests/test_kernels.py's."""
    fixed = Codec(
        name="fixed8",
        block=1,
        bytes=1,
        carrier=np.int8,
        widen=lambda array: array.astype(np.float32) / 16,
        narrow=lambda array: np.clip(np.round(array * 16), -128, 127).astype(np.int8),
    )
    generator = np.random.default_rng(1)
    up, down = (generator.normal(size=(8, 24)).astype(np.float32) for _ in range(2))
    with registered(CODECS, "fixed8", fixed):
        unit = neuron("fixed8", 24)
        assert (unit.bytes, unit.stride, unit.span("down")) == (48, 512, (24, 48))
        mixed = Unit((*neuron("fixed8", 24).rows[:1], *neuron("float16", 24).rows[1:]), 1, 24)
        assert (mixed.bytes, mixed.span("down")) == (72, (24, 72))
        memory = np.zeros((8, unit.stride), np.uint8)
        for role, matrix in (("up", up), ("down", down)):
            unit.view(memory, role).values[:] = fixed.narrow(matrix)
        x = torch.from_numpy(generator.normal(size=(3, 24)).astype(np.float32))
        nothing = torch.zeros(0)
        matrix = Matrix(torch.zeros(0, 24), FLOAT32, 24)
        placed = PlacedLayer({}, matrix, matrix, nothing, nothing, nothing, nothing)
        ffn = TorchFfn(placed, unit, Ffn("plain", 8, 1, "relu"), x, None, Shelf(x.device))
        ids = np.arange(8, dtype=np.int32)
        ffn.add(ids, ids, memory)
        ffn.close()
        output = ffn.finish().numpy()
        stored_up, stored_down = (fixed.widen(fixed.narrow(matrix)) for matrix in (up, down))
    expected = np.maximum(x.numpy() @ stored_up.T, 0) @ stored_down
    assert np.allclose(output, expected, atol=1e-4)


class Lowest(WindowThenOldest):
    """Ids near zero are worth most."""

    def worth(self, ids: Ids) -> np.ndarray:
        return -ids.astype(np.int64)


def test_a_policy() -> None:
    settings = Cache.model_validate({"policy": "lowest"})
    with registered(POLICIES, "lowest", lambda units, settings: Lowest(units, settings.window)):
        residency = Residency(10, 3, make_policy(10, settings))
    residency.begin(0)
    residency.admit(np.array([1, 7, 4]))
    residency.begin(1)
    residency.make_room(1)
    residency.admit(np.array([2]))
    assert sorted(residency.id_of.tolist()) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"cache\.policy is one of lrfu, lru, not 'lowest'"):
        make_policy(10, settings)


class EverySecond(Scorer):
    """Wants the even units of even layers, and the odd ones of odd layers."""

    notes = ("every second unit",)

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        return np.arange(10) % 2 == layer % 2


def test_a_scorer() -> None:
    forecast = Forecast("second", 0, refine=False)  # type: ignore[arg-type]
    plan = Plan(
        d_model=4,
        units=(10, 10),
        stride=512,
        slots=(4, 4),
        staging=2,
        context=8,
        hidden_rows=1,
        forecast=forecast,
    )
    with registered(SCORERS, "second", lambda store, config, forecast: EverySecond()):
        scorer = load_scorer(None, Config(), forecast)  # type: ignore[arg-type]
    predicted = np.full((2, 2, 10), -1, np.int32)
    prediction = Prediction(plan, scorer, np.zeros((3, 1, 4), np.float32), predicted)
    (answer,) = prediction.handle(HiddenReady(1, Step(0, 5, 1, every=False), 1, 1, 0))
    assert (answer.layer, answer.certain, answer.doubtful) == (1, 5, 0)
    assert predicted[1, 0, :5].tolist() == [1, 3, 5, 7, 9]
