"""The audit against a computation of its own, in a ring; the named points of quality."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict

import numpy as np
import predictors
import pytest
from checkpoints import write_checkpoint
from prometheus_client.parser import text_string_to_metric_families
from ring import PROMPT, config, generate, plan_for
from safetensors.numpy import load_file
from serving import served

from pipeline.ring.session import Session
from pipeline.serving.client import Client
from storage.convert import NeuronOrder, convert
from storage.errors import UsageError
from storage.manifest import RESIDENT
from storage.store import Store
from workers.compute.audit import Audit
from workers.compute.weights import Weights
from workers.lab.evaluation import audit_picture


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A random ReLU model in a shuffled order, with random predictors."""
    base = tmp_path_factory.mktemp("audit")
    checkpoint = write_checkpoint(base / "checkpoint", "opt", "float32")
    generator = np.random.default_rng(3)
    order = np.array([generator.permutation(192) for _ in range(3)], np.int32)
    made = convert(checkpoint, base / "store", name="small", order=NeuronOrder("shuffled", order))
    layers = range(len(made.layout.layers))
    predictors.write(
        made, predictors.maps(made, "layers", layers) | predictors.maps(made, "inlayer", layers, seed=2)
    )
    return made


def test_one_look_counts_what_a_plain_computation_counts(store):
    audit = Audit(store, Weights(store), 1)
    audit.next_token()
    audit.next_token()
    assert audit.layer == 1
    generator = np.random.default_rng(0)
    x = generator.normal(size=64).astype(np.float32)
    ids = np.sort(generator.choice(192, 80, replace=False)).astype(np.int32)
    resident = load_file(store.path / RESIDENT)
    up, down = (rows.widened().astype(np.float64) for rows in store.ffn(1, "up", "down"))
    a = np.maximum(up @ x + resident["layers.1.up.bias"], 0)
    whole = a @ down + resident["layers.1.down.bias"]
    chosen = np.zeros(192, bool)
    chosen[ids] = True
    part = (a * chosen) @ down + resident["layers.1.down.bias"]
    sums: dict[str, float] = defaultdict(float)
    audit.look(x, ids, part.astype(np.float32), sums)
    wanted = {
        "tokens": 1,
        "active": (a > 0).sum(),
        "missed": ((a > 0) & ~chosen).sum(),
        "wrong": ((a <= 0) & chosen).sum(),
        "inactive": (a <= 0).sum(),
        "magnitude": a.sum(),
        "magnitude_missed": a[~chosen].sum(),
        "output": (whole**2).sum(),
        "error": ((whole - part) ** 2).sum(),
    }
    assert {name: pytest.approx(value, rel=1e-4) for name, value in wanted.items()} == {
        name.removeprefix("layer.1.audit_"): value for name, value in sums.items() if "layer" in name
    }
    assert sums["audit_active"] == wanted["active"]
    assert sums["audit_found"] == wanted["active"] - wanted["missed"]
    assert wanted["missed"] > 0


def test_every_nth_token_has_one_layer_in_turn(store):
    audit = Audit(store, Weights(store), 2)
    seen = []
    for _ in range(8):
        audit.next_token()
        seen.append(audit.layer)
    assert seen == [0, -1, 1, -1, 2, -1, 0, -1]


def audited(store: Store, **predictor: object) -> tuple[dict, list[int]]:
    chosen = config(predictor=predictor, compute={"threads": 1, "context": 128, "audit": 1})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        tokens = generate(session, 13).tokens
        report = session.summary().audit
        assert report is not None
        return report.to_json(), tokens


@pytest.mark.ring
def test_the_oracle_is_never_wrong(store):
    found, _ = audited(store, kind="oracle")
    assert found["tokens"] == 12
    assert [one["tokens"] for one in found["layers"]] == [4, 4, 4]
    assert found["false_negatives"] == 0.0
    assert found["weighted_recall"] == 1.0
    assert found["output_error"] < 1e-5
    assert found["false_positives"] < 0.02  # the oracle's margin


@pytest.mark.ring
def test_random_predictions_are_found_out_and_the_text_stays(store, tmp_path):
    found, tokens = audited(store, kind="lowrank")
    assert 0.2 < found["false_negatives"] < 0.8
    assert 0.2 < found["false_positives"] < 0.8
    assert 0.2 < found["weighted_recall"] < 0.8
    assert found["output_error"] > 0.1
    chosen = config(predictor={"kind": "lowrank"})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        assert generate(session, 13).tokens == tokens
        assert session.summary().audit is None
    (tmp_path / "run.json").write_text(json.dumps({"audit": found}), encoding="utf-8")
    audit_picture.main(tmp_path / "run.json", tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 10_000


@pytest.mark.ring
def test_a_served_rings_recall_is_a_metric(store, tmp_path):
    chosen = config(predictor={"kind": "lowrank"}, compute={"threads": 1, "context": 128, "audit": 1})
    plan = plan_for(store, chosen)
    with served(tmp_path, lambda: Session(store, chosen, plan), http={}) as server:
        assert "flashring_predictor_recall" not in metrics(server.url)
        with Client(server.endpoint) as client:
            client.generate(PROMPT, max_new_tokens=13, temperature=0.0, ignore_eos=True).read()
        found = metrics(server.url)
    audited_alone, _ = audited(store, kind="lowrank")
    assert found["flashring_predictor_recall"] == pytest.approx(1 - audited_alone["false_negatives"])
    for one in audited_alone["layers"]:
        layer = found[f"flashring_predictor_layer_recall/{one['layer']}"]
        assert layer == pytest.approx(1 - one["false_negatives"])


def metrics(url: str) -> dict[str, float]:
    """Samples by name, and label where there is one."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_run_without_audit_has_no_picture(tmp_path):
    (tmp_path / "run.json").write_text('{"audit": null}', encoding="utf-8")
    with pytest.raises(UsageError, match="--audit"):
        audit_picture.main(tmp_path / "run.json", tmp_path / "audit.png")
