"""The lossy dials of a mixture: what each one chooses, in pieces and in a ring, and who is refused them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from ring import PROMPT, Outcome, config, generate, outcome, plan_for

from pipeline import dials
from pipeline.commands.generate import describe
from pipeline.config import Config
from pipeline.planner.divide import least, plan
from pipeline.ring.session import Session
from storage.architecture import Router
from storage.convert import convert
from storage.errors import ConfigError
from storage.store import Store
from workers.cache.policy import WindowThenOldest
from workers.cache.residency import Residency
from workers.compute.weights import Weights
from workers.lab.evaluation.dials import EXACT, compare
from workers.lab.offline.local_ring import LocalRing
from workers.predictor.router import with_stand_ins
from workers.routing import ranked, route, weigh

EXPERTS, TOP = 8, 3
WORDS = " ".join(f"word{number % 50}" for number in range(400))


def routed(**sections: Mapping[str, Any]) -> Config:
    """The tests' configuration with the model's own forecast and no guesses."""
    predictor = {"kind": "auto", "refine": None, "guesses": 0, **sections.pop("predictor", {})}
    found: Config = config(predictor=predictor, **sections)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight experts, three a token, and one dense layer of three."""
    base = tmp_path_factory.mktemp("dials")
    checkpoint = write_checkpoint(base / "checkpoint", "qwen3-moe-dense-layer", "bfloat16")
    return convert(checkpoint, base / "store", name="mixture")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("dense")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="dense")


# -- choosing -----------------------------------------------------------------------------------


def preferred(logits: np.ndarray[Any, Any], resident: set[int], top_k: int, bonus: float) -> list[int]:
    """The plain rule: the `top_k` best once residents have their bonus, the likeliest always among them."""
    raised = [(value + bonus * (one in resident), -one) for one, value in enumerate(logits.tolist())]
    best = int(logits.argmax())
    raised[best] = (np.inf, 0)
    return sorted(sorted(range(logits.size), key=raised.__getitem__)[-top_k:])


@pytest.mark.parametrize("prefer", [0.05, 0.3, 1.0])
def test_residents_are_preferred_by_the_plain_rule(prefer: float) -> None:
    rng, changed = np.random.default_rng(5), 0
    for _ in range(200):
        logits = rng.normal(size=16).astype(np.float32)
        resident = set(rng.choice(16, 8, replace=False).tolist())
        residency = Residency(16, 8, WindowThenOldest(16, 0))
        residency.admit(np.array(sorted(resident)))
        chosen = ranked(logits, 4)
        listed = with_stand_ins(logits, chosen, chosen, prefer)
        found = residency.prefer(listed).tolist()
        bonus = float(np.float32(prefer) * (logits.max() - logits.min()))
        assert found == preferred(logits, resident, 4, bonus)
        changed += found != sorted(chosen.tolist())
    assert changed > 20


def test_who_is_listed() -> None:
    """Stand-ins as ~id, before the expert that they beat; none that could not be taken."""
    logits = np.array([5, 1, 4.5, 3, 4, -5], np.float32)
    chosen = ranked(logits, 3)
    assert chosen.tolist() == [0, 2, 4]
    assert with_stand_ins(logits, chosen, chosen, 0.05).tolist() == [0, 2, 4]
    assert with_stand_ins(logits, chosen, chosen, 0.12).tolist() == [0, 2, ~3, 4]
    assert with_stand_ins(logits, chosen, chosen, 1.0).tolist() == [0, ~3, ~1, ~5, 2, 4]
    assert with_stand_ins(logits, chosen[:2], chosen, 0.12).tolist() == [0, 2]


@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_of_others_are_the_routers_own(renormalise: bool) -> None:
    router, logits = Router(2, renormalise=renormalise), np.log(np.array([[1, 2, 3, 4]], np.float32))
    assert np.array_equal(
        weigh(router, logits, route(router, logits).ids).weights, route(router, logits).weights
    )
    of = 5 if renormalise else 10
    assert np.allclose(weigh(router, logits, np.array([[0, 3]])).weights, [[1 / of, 4 / of]])
    assert np.allclose(weigh(router, logits, np.array([[3]])).weights, [[1 if renormalise else 0.4]])


# -- fewer experts ------------------------------------------------------------------------------


def test_fewer_experts_are_the_model_with_a_smaller_top_k(tmp_path: Path, store: Store) -> None:
    """As if its config.json said so: the same logits, of prompts and of tokens."""
    changes = {"num_experts_per_tok": 2}
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", "qwen3-moe-dense-layer", "bfloat16", changes=changes
    )
    smaller = convert(checkpoint, tmp_path / "store", name="mixture")
    fewer = dials.with_fewer(store, routed(experts={"per_token": 2}))
    assert fewer.architecture == smaller.architecture != store.architecture
    assert dials.with_fewer(store, routed()) is store
    with LocalDecoder(smaller) as one, LocalDecoder(fewer) as other:
        assert np.array_equal(one.prefill(PROMPT), other.prefill(PROMPT))
        assert np.array_equal(one.step(5), other.step(5))


def test_fewer_experts_need_fewer_slots(store: Store) -> None:
    two = routed(experts={"per_token": 2})
    assert least(store, routed()).plan.slots == (3, 0, 3)
    assert least(store, two).plan.slots == (2, 0, 2)
    assert plan(store, routed(experts={"per_token": 2}, cache={"slots_per_layer": 2})).plan.slots == (2, 0, 2)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["per_token", "prefer", "skip"])
def test_a_model_without_experts_refuses(dense: Store, name: str) -> None:
    with pytest.raises(ConfigError, match=f"experts.{name} needs a mixture of experts, and dense is none"):
        plan(dense, Config.parse({"experts": {name: 1}}))


def test_more_experts_than_the_router_chooses_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="per_token 4 is more than the 3 experts"):
        plan(store, routed(experts={"per_token": 4}))


@pytest.mark.parametrize("name", ["prefer", "skip"])
def test_what_reads_everything_refuses(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match=f"experts.{name} needs predictor.kind router"):
        plan(store, routed(experts={name: 0.1}, predictor={"kind": "all"}))


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", float("nan")])
def test_shares_are_shares(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"experts\.prefer"):
        Config.parse({"experts": {"prefer": value}})


# -- rings --------------------------------------------------------------------------------------


def texts(store: Store, **experts: Any) -> tuple[Outcome, float, tuple[str, ...], str]:
    """A text in a ring with 4 slots a layer; experts read, and what the summary says."""
    chosen = routed(cache={"slots_per_layer": 4}, experts=experts)
    with Session(store, chosen, plan_for(store, chosen)) as session:
        found = generate(session)
        assert session.last is not None
        summary = session.summary()
        assert summary.to_json()["lossy"] == list(summary.lossy)
        return found, session.last.delta("prefetcher", "decode_bundles"), summary.lossy, describe(summary)


def local(store: Store, tokens: list[int], **experts: Any) -> tuple[list[float], int, int]:
    """Log-probabilities of the tokens, experts read, and experts computed, in one process."""
    chosen = routed(cache={"slots_per_layer": 4}, experts=experts)
    report, fewer = plan(store, chosen), dials.with_fewer(store, chosen)
    units = [store.read_layer(index) for index in range(len(store.layout.layers))]
    with LocalRing(fewer, report.config, report.plan, Weights(fewer), units, 1) as ring:
        logits, found = ring.prefill(PROMPT)[-1], []
        for position, token in enumerate(tokens, len(PROMPT)):
            shifted = logits.astype(np.float64) - logits.max()
            found.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
            if len(found) < len(tokens):
                logits = ring.step(position, token)
        ring.cache.validate()
        return found, ring.read, ring.computed


@pytest.mark.ring
@pytest.mark.parametrize(
    "experts",
    [{}, {"per_token": 2}, {"prefer": 0.2}, {"skip": 0.3}, {"prefer": 0.2, "skip": 0.3, "per_token": 2}],
    ids=str,
)
def test_a_ring_writes_what_one_process_does(store: Store, experts: dict[str, Any]) -> None:
    """The ring's text and reads are those of its pieces in a row; they are named, and cheaper than exact."""
    found, read, lossy, line = texts(store, **experts)
    logs, expected, computed = local(store, found.tokens, **experts)
    assert np.allclose(logs, found.logprobs, atol=1e-5)
    assert read == expected
    exactly, most, _ = local(store, found.tokens)
    steps = len(found.tokens) - 1
    if experts:
        assert read < most
        assert not np.allclose(logs, exactly, atol=1e-4)
        assert f"lossy: {', '.join(lossy)}]" in line
    else:
        assert (lossy, "lossy" in line) == ((), False)
    each = 2 * experts.get("per_token", TOP)
    assert computed < each * steps if "skip" in experts else computed == each * steps


@pytest.mark.ring
def test_only_fewer_experts_write_the_same_whatever_the_slots(store: Store) -> None:
    def changed(**cache: Any) -> Outcome:
        return outcome(store, routed(experts={"per_token": 2}, cache=cache, predictor={"guesses": 2}))

    assert changed(slots_per_layer=2) == changed(slots_per_layer=6) == changed(share=1.0)


@pytest.mark.ring
def test_what_is_all_in_memory_has_nothing_to_prefer_or_skip(store: Store) -> None:
    everything = {"share": 1.0}
    exact = outcome(store, routed(cache=everything))
    assert outcome(store, routed(cache=everything, experts={"prefer": 1.0, "skip": 1.0})) == exact


@pytest.mark.ring
def test_pinned_layers_are_exact(store: Store) -> None:
    """They are read whole, and compute takes of them what their routers choose."""
    exact = outcome(store, routed())
    pinned = routed(predictor={"pinned_layers": [0, 2]}, experts={"prefer": 0.5, "skip": 0.5})
    assert outcome(store, pinned) == exact


def test_words(store: Store) -> None:
    assert dials.in_words(store, routed(experts={"per_token": 2})) == ("2 of 3 experts",)
    assert dials.in_words(store, routed(experts={"per_token": 3})) == ()
    both = dials.in_words(store, routed(experts={"prefer": 0.1, "skip": 0.05}))
    assert both == (
        "experts in memory preferred by 0.1",
        "absent experts below a weight of 0.05 skipped",
    )


# -- the evaluation -----------------------------------------------------------------------------


def test_the_evaluation_weighs_cost_and_saving(store: Store) -> None:
    """More of a dial reads less; what changes nothing is the exact one to the bit."""
    points = {EXACT: {}, "same": {"per_token": 3}, "two": {"per_token": 2}, "one": {"per_token": 1}}
    points |= {"skip": {"skip": 0.3}, "prefer": {"prefer": 0.3}}
    configs = {
        name: routed(experts=experts, cache={"slots_per_layer": 4}) for name, experts in points.items()
    }
    found, count = compare(store, configs, WORDS, 120, seed=0, threads=1)
    rows = {one.name: one for one in found}
    assert count == 120
    assert (rows["same"].divergence_mean, rows["same"].agreement.value) == (0, 1)
    assert rows["same"].perplexity == rows[EXACT].perplexity
    assert [rows[name].experts for name in (EXACT, "two", "one", "prefer")] == [6, 4, 2, 6]
    assert rows["skip"].experts < 6
    assert rows["one"].misses < rows["two"].misses < rows[EXACT].misses
    assert max(rows["skip"].misses, rows["prefer"].misses) < rows[EXACT].misses
    assert all(rows[name].divergence_mean > 0 for name in ("two", "one", "skip", "prefer"))
    assert rows["one"].divergence_mean > rows["two"].divergence_mean
    assert rows["two"].bytes_per_token == rows["two"].misses * store.layout.stride
