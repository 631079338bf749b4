"""Gated FFNs, and the rest of what gated decoders brought, beside plain arithmetic."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DTYPES, write_checkpoint
from ring import alike, config, generate, outcome, plan_for

from pipeline.planner.divide import plan
from pipeline.ring.session import Session
from storage.architecture import Ffn, LongropeScaling, Rope
from storage.codecs import CODECS, FLOAT32
from storage.convert import NeuronOrder, convert
from storage.errors import StoreError, UsageError
from storage.layout import neuron
from storage.store import Store
from workers import kernels
from workers.compute.audit import Audit
from workers.compute.positions import rotary
from workers.compute.weights import Weights
from workers.lab.offline.chooser import OracleScores
from workers.lab.training.__main__ import make
from workers.lab.training.job import Split, TrainingJob
from workers.lab.training.report import LayerReport
from workers.predictor.oracle import Oracle

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "fatrelu": lambda x: np.where(x > 0.5, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def units_of(dtype: str, count: int, width: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Units [count, stride] of random rows, and the rows as float64."""
    unit, codec, rows = neuron(dtype, width, kind="gated"), CODECS[dtype], {}
    memory = np.zeros((count, unit.stride), np.uint8)
    for seed, row in enumerate(unit.rows):
        values = codec.narrow(normal(seed, count, width) / np.float32(math.sqrt(width)))
        unit.view(memory, row.role).values[:] = values
        rows[row.role] = codec.widen(values).astype(np.float64)
    return memory, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rectified", [False, True])
def test_a_gated_neuron_is_the_function_of_its_gate_times_its_up(
    dtype: str, function: str, rectified: bool
) -> None:
    count, width = 75, 130
    memory, rows = units_of(dtype, count, width)
    unit, h = neuron(dtype, width, kind="gated"), 2 * normal(9, width)
    gate, up = unit.view(memory, "gate"), unit.view(memory, "up")
    biases = normal(7, 4 * count), normal(8, 4 * count)
    slots = np.random.default_rng(1).permutation(count).astype(np.int32)
    ids = 3 * np.arange(count, dtype=np.int32)
    threshold = 0.5 if function == "fatrelu" else 0.0
    ffn = Ffn("gated", count, 1, function, threshold, "relu" if rectified else "none")  # type: ignore[arg-type]
    g, u = (rows[role][slots] @ h + bias[ids] for role, bias in zip(("gate", "up"), biases, strict=True))
    expected = FUNCTIONS[function](g) * (np.maximum(u, 0) if rectified else u)
    found = [kernels.activate_gated(gate, up, ids, slots, h, biases, ffn, threads) for threads in (1, 2)]
    assert np.allclose(found[0], expected, rtol=1e-4, atol=1e-4)
    assert found[0].tobytes() == found[1].tobytes()
    alone = [
        kernels.activate_gated(gate, up, ids[i : i + 1], slots[i : i + 1], h, biases, ffn, 1)[0]
        for i in range(count)
    ]
    assert np.array(alone, np.float32).tobytes() == found[0].tobytes()
    y = np.zeros(width, np.float32)
    active = kernels.accumulate(unit.view(memory, "down"), ids, slots, found[0], y, 2)
    assert active == np.count_nonzero(found[0])
    assert np.allclose(y, expected @ rows["down"][slots], rtol=1e-3, atol=1e-3)


def test_the_up_row_of_a_gate_that_is_zero_is_not_read() -> None:
    count, width = 75, 130
    memory, rows = units_of("float16", count, width)
    unit, h = neuron("float16", width, kind="gated"), normal(9, width)
    places = np.arange(count, dtype=np.int32)
    biases = np.zeros(0, np.float32), np.zeros(0, np.float32)
    arguments = (places, places, h, biases, Ffn("gated", count, 1, "relu"), 2)
    gate, up = unit.view(memory, "gate"), unit.view(memory, "up")
    before = kernels.activate_gated(gate, up, *arguments)
    silent = rows["gate"] @ h < -1e-3
    assert 20 < silent.sum() < 55
    up.values[silent] = np.array(np.nan, np.float16).view(np.uint16)
    assert np.array_equal(kernels.activate_gated(gate, up, *arguments), before)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_root_mean_square_norm_keeps_the_mean(offset: int) -> None:
    x, weight = 3 + normal(1, 5, 77), normal(2, 77)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5) * (weight + offset)
    assert np.allclose(kernels.rms_norm(x, weight, offset, 1e-5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("position", [0, 6, 19])
def test_a_token_sees_its_window(window: int | None, softcap: float | None, position: int) -> None:
    heads, width, context = 4, 24, 20
    keys, values = normal(1, 2, context, width), normal(2, 2, context, width)
    projected, angles = normal(3, (heads + 4) * width), normal(4, 2, 8)
    vectors = projected.reshape(-1, width).astype(np.float64)
    (cos, sin), low, high = angles, vectors[:6, :8].copy(), vectors[:6, 8:16].copy()
    vectors[:6, :8], vectors[:6, 8:16] = low * cos - high * sin, high * cos + low * sin  # the rest stays
    kept_keys, kept_values = keys.astype(np.float64), values.astype(np.float64)
    kept_keys[:, position], kept_values[:, position] = vectors[4:6], vectors[6:]
    first = 0 if window is None else max(0, position + 1 - window)
    expected = []
    for head in range(heads):
        scores = kept_keys[head // 2, first : position + 1] @ vectors[head] * 0.3
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        expected.append(weights @ kept_values[head // 2, first : position + 1] / weights.sum())
    scratch, none = np.empty((heads, context), np.float32), np.zeros((0, 0), np.float32)
    got = kernels.attend(
        projected, *angles, keys, values, position, 0.3, none, scratch, FLOAT32, 1, window, softcap
    )
    assert np.allclose(got, np.concatenate(expected), rtol=1e-4, atol=1e-5)


def test_longrope_goes_by_the_context_that_is_kept() -> None:
    rope = Rope(1e4, 8, LongropeScaling((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0), 10, 1.5))
    short, long, plain = rotary(rope, 16, 10), rotary(rope, 16, 11), rotary(Rope(1e4, 8), 16, 11)
    assert np.allclose(short[0], 1.5 * plain[0][:10])
    assert np.allclose(long[1][::2], 1.5 * plain[1][:6], atol=1e-6)


@pytest.fixture(scope="module", params=["prosparse", "bamboo"])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A ReLU-gated model in a shuffled order."""
    base = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(base / "checkpoint", request.param, "float16")
    generator = np.random.default_rng(3)
    order = np.array([generator.permutation(96) for _ in range(3)], np.int32)
    return convert(checkpoint, base / "store", name=request.param, order=NeuronOrder("shuffled", order))


def products(store: Store, layer: int, x: np.ndarray) -> np.ndarray:
    ffn = store.architecture.layers[layer].ffn
    gate, up = (rows.widened().astype(np.float64) @ x for rows in store.ffn(layer, "gate", "up"))
    gate = np.where(gate > ffn.threshold, gate, 0)
    product: np.ndarray = gate * (np.maximum(up, 0) if ffn.up_activation == "relu" else up)
    return product


def test_the_oracle_is_where_products_are_not_zero(sparse: Store) -> None:
    assert sparse.architecture.sparse
    x = 2 * normal(5, 64)
    oracle, scores = Oracle.load(sparse), OracleScores(sparse)
    for layer in range(3):
        active = products(sparse, layer, x) != 0
        mask = oracle.active(layer, x, own=True)
        assert mask[active].all()
        assert 0 < active.sum() <= mask.sum() < active.sum() + 3
        import torch

        assert np.array_equal(scores.active(layer, torch.from_numpy(x)[None], own=True)[0].numpy(), mask)


def test_one_look_of_the_audit_counts_products(sparse: Store) -> None:
    audit = Audit(sparse, Weights(sparse), 1)
    audit.next_token()
    x = 2 * normal(6, 64)
    ids = np.arange(0, 96, 2, dtype=np.int32)
    a = products(sparse, 0, x)
    chosen = np.zeros(96, bool)
    chosen[ids] = True
    (down,) = sparse.ffn(0, "down")
    part = (a * chosen) @ down.widened()
    sums: dict[str, float] = defaultdict(float)
    audit.look(x, ids, part.astype(np.float32), sums)
    found = {name.removeprefix("layer.0.audit_"): value for name, value in sums.items() if "layer" in name}
    assert found["active"] == np.count_nonzero(a)
    assert found["missed"] == np.count_nonzero(a[~chosen])
    assert found["magnitude_missed"] == pytest.approx(np.abs(a[~chosen]).sum(), rel=1e-4)
    assert found["output"] == pytest.approx(np.square(a @ down.widened()).sum(), rel=1e-4)


@pytest.fixture(scope="module")
def trained(sparse: Store, tmp_path_factory: pytest.TempPathFactory) -> list[LayerReport]:
    """Predictors named `learnt`."""
    tokens = np.random.default_rng(3).integers(4, 200, (32, 32))
    work = tmp_path_factory.mktemp("work")
    return make(sparse, tokens, Split.of(28, 4, 32), TrainingJob(rank=32), "learnt", work)


def test_predictors_learn_what_the_gate_decides(sparse: Store, trained: list[LayerReport]) -> None:
    x = 2 * normal(5, 512, 64)
    for one in (report for report in trained if report.lookahead == 0):
        active = np.mean([np.mean(products(sparse, one.layer, row) != 0) for row in x])
        assert 0.1 < active < 0.6
        assert abs(one.active - active) < 0.2
        # Chance has as much recall as it predicts.
        assert one.recall > one.predicted + 0.2


def test_a_decomposition_knows_one_projection(sparse: Store, tmp_path: Path) -> None:
    tokens = np.random.default_rng(4).integers(4, 200, (4, 16))
    job, split, work = TrainingJob(0, rank=64, method="svd"), Split.of(4, 0, 16), tmp_path / "work"
    if sparse.architecture.family == "bamboo":
        with pytest.raises(UsageError, match="two projections decide"):
            make(sparse, tokens, split, job, "svd", work)
        assert not work.exists()
    else:  # of full rank, it is that projection
        assert all(one.precision > 0.9 for one in make(sparse, tokens, split, job, "svd", work))


@pytest.mark.ring
def test_the_ring_runs_by_predictors_and_the_audit_agrees_with_their_report(
    sparse: Store, trained: list[LayerReport]
) -> None:
    chosen = config(
        predictor={"kind": "lowrank"},
        compute={"threads": 2, "context": 128, "audit": 1},
        model={"predictor": "learnt"},
    )
    with Session(sparse, chosen, plan_for(sparse, chosen, slots=40, staging=7)) as session:
        tokens = generate(session, 60).tokens
        report = session.summary().audit
    assert len(tokens) == 60
    assert report is not None
    found = report.to_json()
    own = [one for one in trained if one.lookahead == 0]
    for name in ("false_negatives", "false_positives"):
        assert found[name] == pytest.approx(np.mean([getattr(one, name) for one in own]), abs=0.15)


def test_the_plan_counts_what_the_oracle_holds(sparse: Store) -> None:
    held = plan(sparse, config()).parts["predictors"]
    assert held == 3 * 96 * 64 * 2 * (2 if sparse.architecture.family == "bamboo" else 1)


@pytest.mark.ring
def test_the_text_is_the_same_with_every_neuron_and_with_the_oracles(sparse: Store) -> None:
    """And wherever the units lie."""
    everything = outcome(sparse, config(predictor={"kind": "all"}), slots=96)
    chosen = config(compute={"threads": 2, "context": 128, "audit": 1})
    with Session(sparse, chosen, plan_for(sparse, chosen, slots=20, staging=7)) as session:
        assert alike(generate(session), everything)
        report = session.summary().audit
    assert report is not None
    found = report.to_json()
    assert (found["false_negatives"], found["weighted_recall"]) == (0.0, 1.0)
    assert found["output_error"] < 1e-5


@pytest.mark.ring
def test_a_dense_gated_ring_does_not_depend_on_its_slots(tmp_path: Path) -> None:
    store = convert(write_checkpoint(tmp_path / "model", "gemma3", "bfloat16"), tmp_path / "store", name="x")
    every = config(predictor={"kind": "all"})
    assert outcome(store, every, slots=96) == outcome(store, every, slots=11, staging=5)


def test_units_that_are_not_the_ffns_are_refused(tmp_path: Path) -> None:
    store = convert(write_checkpoint(tmp_path / "model", "llama"), tmp_path / "store", name="x")
    plain = replace(store.architecture.layers[0].ffn, kind="plain")
    layers = tuple(replace(layer, ffn=plain) for layer in store.architecture.layers)
    architecture = replace(store.architecture, layers=layers)
    manifest = replace(store.manifest, architecture=architecture)
    with pytest.raises(StoreError, match="describes units that this flashring does not read"):
        type(manifest).from_json(json.loads(json.dumps(manifest.to_json())), store.path / "manifest.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 0}, "sizes that cannot be"),
        ({"rope": {"base": 1e4, "dims": 5}}, "positions do not fit its heads"),
        ({"rope": {"base": 1e4, "dims": 18}}, "positions do not fit its heads"),
        (
            {
                "rope": {
                    "base": 1e4,
                    "scaling": {"short": [1], "long": [1], "original": 9, "magnitude": 1, "kind": "longrope"},
                }
            },
            "positions do not fit its heads",
        ),
        ({"rope": {"base": 1e4, "scaling": {"factor": 2, "kind": "ntk"}}}, "is damaged"),
    ],
)
def test_attention_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    store = convert(write_checkpoint(tmp_path / "model", "llama"), tmp_path / "store", name="x")
    data = json.loads(json.dumps(store.manifest.to_json()))
    data["architecture"]["layers"][1]["attention"].update(changes)
    with pytest.raises(StoreError, match=words):
        type(store.manifest).from_json(data, store.path / "manifest.json")
