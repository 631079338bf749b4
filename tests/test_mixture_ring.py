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
from workers.routing import Ids

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


class Listening(LocalDecoder):
    """Notes which experts each layer's rows chose in the last step."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.chosen: dict[int, set[int]] = {}

    def routed(self, index: int, ids: Ids) -> None:
        self.chosen[index] = set(ids.reshape(-1).tolist())


def chosen_by(store: Store, prompt: list[int]) -> dict[int, set[int]]:
    """Of each layer with a router the experts of the prompt's tokens."""
    with Listening(store) as decoder:
        decoder.prefill(prompt)
        return decoder.chosen


def streamed(session: Session) -> tuple[int, int]:
    """Bytes and experts that the last prompt read."""
    assert session.last is not None
    return tuple(int(session.last.delta("prefetcher", f"stream_{what}")) for what in ("bytes", "bundles"))


SHORT = [9, 77, 31]


@pytest.mark.parametrize("slots", [3, 6, 7])
def test_a_prompt_reads_the_experts_that_its_tokens_choose(store: Store, slots: int) -> None:
    """And those alone, each once; again only what has no slot."""
    chosen = routed(cache={"slots_per_layer": slots}, prefetcher={"max_gap": 0})
    touched = chosen_by(store, SHORT)
    count = sum(map(len, touched.values()))
    assert all(3 < len(ids) < 7 for ids in touched.values()), "some are left out, and less than nearly all"
    with Session(store, chosen, plan_for(store, chosen)) as session:
        first = generate(session, 1, SHORT)
        assert streamed(session) == (count * store.layout.stride, count)
        assert generate(session, 1, SHORT) == first
        absent = sum(max(0, len(ids) - slots) for ids in touched.values())
        assert streamed(session) == (absent * store.layout.stride, absent)


def test_short_prompts_write_the_same_whatever_is_read(store: Store) -> None:
    found = []
    for changes in (
        {"predictor": {"kind": "all"}},
        {"cache": {"slots_per_layer": 4}},
        {"cache": {"share": 1.0}, "compute": {"threads": 2, "context": 128}},
        {"prefetcher": {"staging": 1, "backend": "threads"}},
    ):
        chosen = routed(**changes)
        with Session(store, chosen, plan_for(store, chosen)) as session:
            found.append([generate(session, 8, prompt) for prompt in (SHORT, [5], SHORT)])
    assert found[0][0] == found[0][2]
    assert all(one == found[0] for one in found)


def test_what_a_prompts_last_tokens_used_is_there_for_the_next(store: Store) -> None:
    """The window is the prompt here, and the first token's experts are read only where it chose others."""
    chosen = routed(cache={"slots_per_layer": 7}, predictor={"guesses": 0}, prefetcher={"max_gap": 0})
    with Listening(store) as decoder:
        token = int(decoder.prefill(SHORT)[-1].argmax())
        used = dict(decoder.chosen)
        decoder.step(token)
        new = sum(len(ids - used[layer]) for layer, ids in decoder.chosen.items())
    with Session(store, chosen, plan_for(store, chosen)) as session:
        generate(session, 2, SHORT)
        assert session.last is not None
        assert session.last.delta("prefetcher", "decode_bundles") == new


def test_a_long_prompt_reads_nothing_twice(store: Store) -> None:
    """Its tokens choose nearly all experts, so that the next layer's are asked for ahead."""
    prompt = [2 + 7 * number % 90 for number in range(40)]
    touched = chosen_by(store, prompt)
    assert all(len(ids) == 8 for ids in touched.values())
    chosen = routed(cache={"slots_per_layer": 4}, prefetcher={"max_gap": 0})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        generate(session, 1, prompt)
        assert streamed(session)[1] == 16


def test_a_mixture_in_memory_asks_once(store: Store, reference: Outcome) -> None:
    """The first prompt reads every expert; then nothing is predicted, cached or read."""
    chosen = routed(cache={"share": 1.0})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        assert session.plan.whole
        assert generate(session) == reference
        assert streamed(session)[1] == 16
        assert session.last is not None
        assert session.last.delta("predictor", "calls") == 4, "the embedding and three layers, of the prompt"
        assert generate(session, prompt=SHORT) == generate(session, prompt=SHORT)
        assert session.last.delta("predictor", "calls") == 0
        assert session.last.delta("prefetcher", "parts") == 0
        use = session.summary().cache
        assert (use.hits, use.misses) == (23 * 6, 0), "three experts of two layers a token"


def test_history_does_not_change_the_text(store: Store, reference: Outcome) -> None:
    chosen = routed(cache={"slots_per_layer": 4})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        generate(session, prompt=[2, 5, 5, 5])
        assert generate(session) == reference
