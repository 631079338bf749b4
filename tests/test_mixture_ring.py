"""A mixture of experts in a ring: fewer slots than experts, and the same text however they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from ring import PROMPT, Outcome, config, generate, outcome, plan_for

from pipeline.ring.session import Session
from storage.convert import convert
from storage.store import Store

pytestmark = pytest.mark.ring


def routed(**sections: Mapping[str, Any]) -> Any:
    """The tests' configuration with the model's own forecast."""
    predictor = {"kind": "auto", "refine": None, **sections.pop("predictor", {})}
    return config(predictor=predictor, **sections)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight experts, three a token, and one dense layer of three."""
    base = tmp_path_factory.mktemp("mixture")
    checkpoint = write_checkpoint(base / "checkpoint", "qwen3-moe-dense-layer", "bfloat16")
    return convert(checkpoint, base / "store", name="mixture")


@pytest.fixture(scope="module")
def reference(store: Store) -> Outcome:
    """What is written where a token's three experts just fit."""
    chosen = routed()
    plan = plan_for(store, chosen)
    assert (plan.forecast.kind, plan.slots, plan.units) == ("router", (3, 0, 3), (8, 0, 8))
    with Session(store, chosen, plan) as session:
        return generate(session)


def test_the_text_is_the_decoders(store: Store, reference: Outcome) -> None:
    """The ring computes what one process does that has all experts at hand."""
    with LocalDecoder(store) as decoder:
        logits = decoder.prefill(PROMPT)[-1]
        tokens = []
        for _ in reference.tokens:
            tokens.append(int(logits.argmax()))
            logits = decoder.step(tokens[-1])
    assert tokens == reference.tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"predictor": {"guesses": 0}},
        {"predictor": {"guesses": 8, "lookahead": 2}, "cache": {"slots_per_layer": 5}},
        {"predictor": {"kind": "all"}},
        {"cache": {"share": 1.0}, "compute": {"threads": 2, "context": 128}},
        {"prefetcher": {"readers": 3, "max_read": 4096, "backend": "threads"}},
        {"cache": {"policy": "lru", "keep": False}},
        {"cache": {"hits_first": False, "slots_per_layer": 5}},
    ],
    ids=str,
)
def test_text_does_not_depend_on_how_it_is_made(
    store: Store, reference: Outcome, changes: dict[str, Any]
) -> None:
    assert outcome(store, routed(**changes)) == reference


def test_experts_through_staging(store: Store, reference: Outcome) -> None:
    """Less than a token's experts have a slot: the others come by groups, and are summed in their order."""
    chosen = routed()
    plan = plan_for(store, chosen, staging=1)
    with Session(store, chosen, replace(plan, slots=(1, 0, 1))) as session:
        assert generate(session) == reference


def test_history_does_not_change_the_text(store: Store, reference: Outcome) -> None:
    chosen = routed(cache={"slots_per_layer": 4})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        generate(session, prompt=[2, 5, 5, 5])
        assert generate(session) == reference
