"""What is predicted when: PROTOCOL.md's table, spelled out."""

from __future__ import annotations

import pytest

from pipeline.ring.messages import EMBEDDING
from workers.predictor.targets import Mode, Target, targets


def sets(*layers: int) -> list[Target]:
    return [Target(layer, guess=False, every=False) for layer in layers]


def guesses(*layers: int) -> list[Target]:
    return [Target(layer, guess=True, every=False) for layer in layers]


def streams(*layers: int) -> list[Target]:
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
    assert targets(Mode(4, lookahead, refine), source, stream=False) == expected


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(
    ("lookahead", "source", "expected"),
    [
        (0, EMBEDDING, streams(0)),
        (0, 0, streams(1)),
        (1, EMBEDDING, streams(0)),
        (1, 2, streams(3)),
        (1, 3, []),
        (2, EMBEDDING, streams(0, 1)),
        (2, 1, streams(3)),
        (2, 2, []),
    ],
)
def test_prefill(lookahead, source, expected, refine):
    assert targets(Mode(4, lookahead, refine), source, stream=True) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
def test_every_layer_has_one_set_in_layer_order(lookahead, refine, stream, every):
    mode = Mode(4, lookahead, refine, every=every)
    sent = [target for source in range(EMBEDDING, 4) for target in targets(mode, source, stream)]
    assert [target.layer for target in sent if not target.guess] == [0, 1, 2, 3]


def test_pinned_layers_have_every_neuron_as_guess_and_set():
    mode = Mode(3, 1, True, pinned=frozenset({1}))
    assert targets(mode, 0, stream=False) == [Target(0, False, False), Target(1, True, True)]
    assert targets(mode, 1, stream=False) == [Target(1, False, True), Target(2, True, False)]


def test_kind_all_never_waits_for_the_layers_own_input():
    mode = Mode(3, 1, True, every=True)
    assert targets(mode, 0, stream=False) == [Target(1, False, True)]
