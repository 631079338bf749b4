"""What is predicted when: PROTOCOL.md's table, spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.ring.messages import EMBEDDING
from pipeline.ring.plan import Forecast, Plan
from workers.predictor.targets import Target, targets, targets_of_choice


def sets(*layers: int) -> list[Target]:
    return [Target(layer, guess=False, every=False) for layer in layers]


def guesses(*layers: int) -> list[Target]:
    return [Target(layer, guess=True, every=False) for layer in layers]


def everything(*layers: int) -> list[Target]:
    return [Target(layer, guess=False, every=True) for layer in layers]


@pytest.mark.parametrize(
    ("lookahead", "refine", "source", "expected"),
    [
        (0, False, EMBEDDING, []),
        (0, False, 2, sets(2)),
        (0, True, EMBEDDING, []),
        (0, True, 3, sets(3)),
        (1, False, EMBEDDING, sets(0)),
        (1, False, 0, sets(1)),
        (1, False, 3, []),
        (2, False, EMBEDDING, sets(0, 1)),
        (2, False, 1, sets(3)),
        (2, False, 2, []),
        (1, True, EMBEDDING, guesses(0)),
        (1, True, 0, sets(0) + guesses(1)),
        (1, True, 3, sets(3)),
        (2, True, EMBEDDING, guesses(0, 1)),
        (2, True, 1, sets(1) + guesses(3)),
        (2, True, 3, sets(3)),
        (8, False, EMBEDDING, sets(0, 1, 2, 3)),
    ],
)
def test_decode(lookahead, refine, source, expected):
    assert targets(Forecast("lowrank", lookahead, refine), 4, source, every=False) == expected


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(
    ("lookahead", "source", "expected"),
    [
        (0, EMBEDDING, everything(0)),
        (0, 0, everything(1)),
        (1, EMBEDDING, everything(0)),
        (1, 2, everything(3)),
        (1, 3, []),
        (2, EMBEDDING, everything(0, 1)),
        (2, 1, everything(3)),
        (2, 2, []),
    ],
)
def test_prefill(lookahead, source, expected, refine):
    assert targets(Forecast("lowrank", lookahead, refine), 4, source, every=True) == expected


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("kind", ["lowrank", "all"])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
def test_every_layer_has_one_set_in_layer_order(lookahead, refine, every, kind):
    forecast = Forecast(kind, lookahead, refine)
    sent = [target for source in range(EMBEDDING, 4) for target in targets(forecast, 4, source, every)]
    assert [target.layer for target in sent if not target.guess] == [0, 1, 2, 3]


def test_pinned_layers_have_every_neuron_as_guess_and_set():
    forecast = Forecast("lowrank", 1, True, pinned=frozenset({1}))
    assert targets(forecast, 3, 0, every=False) == [Target(0, False, False), Target(1, True, True)]
    assert targets(forecast, 3, 1, every=False) == [Target(1, False, True), Target(2, True, False)]


def test_kind_all_never_waits_for_the_layers_own_input():
    forecast = Forecast("all", 1, True)
    assert targets(forecast, 3, 0, every=False) == [Target(1, False, True)]


MIXTURE = Plan(
    d_model=4,
    units=(10, 0, 10, 10),
    stride=512,
    slots=(4, 0, 4, 4),
    staging=2,
    context=16,
    hidden_rows=1,
    forecast=Forecast("router", 1, True, pinned=frozenset({1})),
)


@pytest.mark.parametrize(
    ("source", "chosen", "asked", "expected"),
    [
        (EMBEDDING, 0, False, []),
        (0, 8, False, sets(0)),
        (0, 10, False, sets(0)),  # the next layer has no experts
        (1, 0, False, everything(1)),
        (2, 8, False, sets(2)),
        (2, 9, False, sets(2) + everything(3)),
        (2, 9, True, everything(3)),
        (2, 8, True, []),
        (3, 10, False, sets(3)),
        (3, 10, True, []),
    ],
)
def test_a_prompt_chooses_its_experts(source, chosen, asked, expected):
    assert targets_of_choice(MIXTURE, source, chosen, asked) == expected


def test_a_mixture_in_memory_wants_everything_once():
    whole = replace(MIXTURE, slots=MIXTURE.units)
    assert whole.whole
    assert not any(whole.wants_chosen(layer) for layer in range(4))
    assert not replace(whole, forecast=Forecast("lowrank", 1, True)).whole
