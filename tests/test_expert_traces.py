"""Traces of experts: what a ring records, and what replay makes of slots, in layers and in one pool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder

from pipeline.config import Config
from pipeline.planner.divide import least, plan
from pipeline.planner.need import FILE, Needs, by_need
from storage.convert import convert
from storage.errors import StoreError
from storage.store import Store
from workers.cache.policy import WindowThenOldest
from workers.compute.cpu import experts
from workers.lab.offline import pool, replay
from workers.lab.offline.policies import Belady, FrequencyByAge, LeastStale, PooledBelady
from workers.lab.offline.ring import record
from workers.lab.offline.trace import Trace, pack
from workers.lab.traces import __main__ as traces

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 16, 3, 120


def random_masks(seed: int) -> np.ndarray:
    """`[layers, tokens, experts]`: some are popular, fewer in deeper layers; of the last some stay."""
    random = np.random.default_rng(seed)
    masks = np.zeros((LAYERS, TOKENS, EXPERTS), np.bool_)
    for layer in range(LAYERS):
        popular = random.permutation((1.0 + np.arange(EXPERTS)) ** -layer)
        for token in range(TOKENS):
            weights = popular + (0.3 * masks[layer, token - 1] if token else 0)
            chosen = random.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())
            masks[layer, token, chosen] = True
    return masks


def make_trace(seed: int = 0) -> Trace:
    return Trace(EXPERTS, 4096, pack(random_masks(seed)), None, None, {"top_k": TOP_K})


def lru(layer: int, slots: int) -> WindowThenOldest:
    return WindowThenOldest(EXPERTS, 0)


# -- slots by need ----------------------------------------------------------------------------------


def test_hits_of_any_number_of_slots_are_those_of_replay() -> None:
    """Exactly where a token has one expert; else it hangs on who leaves of those that one token had."""
    masks = random_masks(0)[1]
    masks &= masks.cumsum(axis=1) == 1
    alone = Trace(EXPERTS, 4096, pack(masks)[None], None, None, {})
    hits = [replay.replay(alone, [slots], lru).hits for slots in range(1, EXPERTS + 1)]
    assert pool.hits_by_slots(masks).tolist() == [0, *hits]
    assert hits[0] < hits[-1]


def needs_of(trace: Trace) -> Needs:
    return pool.needs(trace, [EXPERTS] * trace.layers)


def test_slots_go_where_they_bring_hits() -> None:
    trace, alike, floors = make_trace(), [6] * LAYERS, [TOP_K] * LAYERS
    needs = needs_of(trace)
    slots = by_need(needs.hits, floors, sum(alike))
    assert sum(slots) == sum(alike)
    assert min(slots) >= TOP_K
    assert needs.misses(slots) < needs.misses(alike)
    found = [replay.replay(trace, some, lru) for some in (alike, slots)]
    assert found[1].hits > found[0].hits
    assert needs.instead_of(alike, floors) == slots
    assert by_need(needs.hits, floors, EXPERTS * LAYERS) == [EXPERTS] * LAYERS


def test_layers_stay_alike_where_there_is_little_to_save() -> None:
    """Of the same experts in every layer, and of what is whole or least."""
    masks = np.repeat(random_masks(0)[1:2], LAYERS, axis=0)
    masks[0, 0] = masks[0, 1]
    needs = needs_of(Trace(EXPERTS, 4096, pack(masks), None, None, {}))
    assert needs.instead_of([7] * LAYERS, [TOP_K] * LAYERS) == [7] * LAYERS
    other = needs_of(make_trace())
    for slots in ([EXPERTS] * LAYERS, [TOP_K] * LAYERS):
        assert other.instead_of(slots, [TOP_K] * LAYERS) == slots


def test_a_slot_that_brings_nothing_yet_may_lead_to_one_that_does() -> None:
    """Experts in a ring: no hit for LRU before all of them have a slot."""
    steps = np.arange(TOKENS)
    ring, pair = np.zeros((2, TOKENS, EXPERTS), np.bool_)
    ring[steps, steps % 6] = True
    pair[steps, steps // 3 % 2] = True
    trace = Trace(EXPERTS, 4096, pack(np.stack((ring, pair))), None, None, {"top_k": 1})
    assert by_need(needs_of(trace).hits, [1, 1], 8) == [6, 2]


# -- one pool ---------------------------------------------------------------------------------------


def test_a_pool_of_one_layer_is_that_layer() -> None:
    trace = make_trace()
    alone = Trace(EXPERTS, 4096, trace.active[1:2], None, None, {"top_k": TOP_K})
    masks = alone.masks(alone.used, 0)
    for own, pooled in (
        (WindowThenOldest(EXPERTS, 0), WindowThenOldest(EXPERTS, 0)),
        (Belady(masks), PooledBelady(masks[None])),
    ):
        found = replay.replay(alone, [7], lambda layer, slots, own=own: own)
        assert pool.replay(alone, 7, pooled) == found
        assert found.hits > 0


def test_nothing_beats_the_pools_optimum() -> None:
    trace = make_trace()
    total = 6 * LAYERS
    found = {name: pool.replay(trace, total, make()) for name, make in pool.pooled(trace, [8, 32]).items()}
    assert len({outcome.wanted for outcome in found.values()}) == 1
    assert max(found, key=lambda name: found[name].hits) == "pool, Belady"
    each = replay.replay(trace, [6] * LAYERS, replay.policies(trace, trace, [5], [8])["Belady"])
    assert found["pool, Belady"].hits >= each.hits


def test_what_this_pass_has_not_used_leaves_first_the_last_to_come_up_before_others() -> None:
    """Three layers of four, numbered through. The turn that needs room is layer 1's of token 1."""
    policy = LeastStale(3, 4)
    for turn, ids in ((0, [0, 1]), (1, [4, 5]), (2, [8]), (3, [0])):
        policy.used(np.array(ids), turn)
    order = np.array([0, 1, 4, 8])
    # Layer 1's own come up in three turns, layer 0's in two, layer 2's in the next one; 0 has just been used.
    assert order[np.argsort(policy.worth(order))].tolist() == [4, 1, 8, 0]


def test_frequency_by_age() -> None:
    policy = FrequencyByAge(4)
    for step, ids in enumerate(([0, 1], [0], [0, 2], [3])):
        policy.used(np.array(ids), step)
    worth = policy.worth(np.arange(4))
    assert (worth / worth[3]).tolist() == [
        1.5,
        0.25,
        0.5,
        1,
    ]  # 3 uses two tokens ago, 1 four, 1 two, 1 just now


def test_the_best_after_a_prefill_has_the_first_token_already() -> None:
    trace = make_trace()
    whole = replay.best_after_prefill(trace, [EXPERTS] * LAYERS)
    assert (whole.hit_rate, whole.tokens) == (1, TOKENS)
    least = replay.best_after_prefill(trace, [TOP_K] * LAYERS)
    assert least.wanted == LAYERS * TOP_K * TOKENS
    cold = replay.replay(trace, [TOP_K] * LAYERS, replay.policies(trace, trace, [5], [8])["Belady"])
    assert least.hits == cold.hits + LAYERS * TOP_K  # only the first token's could be there


# -- the commands -----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["trace", *arguments])
    return traces.run()


def test_replay_of_experts_divides_slots_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_trace(0).save(tmp_path / "a.npz")
    make_trace(1).save(tmp_path / "b.npz")
    line = ("replay", str(tmp_path / "a.npz"), "--earlier", str(tmp_path / "b.npz"), "--half-lives", "8")
    assert run(monkeypatch, *line, "--capacities", "0.4", "--json") == 0
    names = {one["policy"] for one in json.loads(capfd.readouterr().out)["policies"]}
    assert names >= {"LRU", "LFU", "LFRU", "LRFU 8", "Belady", "LRFU 8, slots by need"}
    assert names >= {"pool, LRU", "pool, LRFU 8", "pool, least-stale", "pool, Belady"}
    assert run(monkeypatch, *line, "--capacities", "0.1,0.4") == 2
    assert "0.1 of 16 experts are fewer than the 3 of a token" in capfd.readouterr().err


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight experts, three a token, and one dense layer of three."""
    base = tmp_path_factory.mktemp("mixture")
    checkpoint = write_checkpoint(base / "checkpoint", "qwen3-moe-dense-layer", "bfloat16")
    return convert(checkpoint, base / "store", name="mixture")


def test_a_store_with_needs_divides_its_slots(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last layer has two sets in turn, the first one only ever the same three experts."""
    masks = np.zeros((3, 100, 8), np.bool_)
    masks[0, :, :3] = True
    masks[2, ::2, :3] = masks[2, 1::2, 3:6] = True
    meta = {"top_k": 3, "store": store.identity}
    Trace(8, 4096, pack(masks), None, None, meta).save(tmp_path / "a.npz")
    Trace(8, 4096, pack(masks), None, None, {**meta, "store": "another"}).save(tmp_path / "b.npz")
    Trace(8, 4096, pack(masks), None, None, {"store": store.identity}).save(tmp_path / "c.npz")
    config = Config.parse({"cache": {"share": 0.5}})
    assert plan(store, config).plan.slots == (4, 0, 4)
    assert run(monkeypatch, "needs", str(tmp_path / "b.npz"), "--store", str(store.path)) == 2
    assert run(monkeypatch, "needs", str(tmp_path / "c.npz"), "--store", str(store.path)) == 2
    said = capfd.readouterr().err
    assert "b.npz is no trace of" in said
    assert "c.npz is no trace of experts" in said
    assert not (store.path / FILE).exists()
    try:
        assert run(monkeypatch, "needs", str(tmp_path / "a.npz"), "--store", str(store.path)) == 0
        found = plan(store, config)
        assert found.plan.slots == (3, 0, 5), "a sixth slot would bring the hits, and so does a fifth"
        assert found.lines[0].endswith("8 slots, 0 to 5 a layer by need")
        evenly = config.replace(cache={"by_need": False})
        assert plan(store, evenly).plan.slots == (4, 0, 4)
        every = config.replace(predictor={"kind": "all"})
        assert plan(store, every).plan.slots == (4, 0, 4)
        budget = least(store, config).total + 4 * store.layout.stride
        limited = plan(store, config.replace(memory={"budget": f"{budget}B"}))
        assert sum(limited.plan.slots) > 6
        assert limited.total <= budget
        for text, words in (("{", "cannot be read"), ("[]", "is damaged")):
            (store.path / FILE).write_text(text)
            with pytest.raises(StoreError, match=words):
                plan(store, config)
        Needs("another", 3, ((0,), (0,), (0,))).write(store)
        with pytest.raises(StoreError, match="is of other weights"):
            plan(store, config)
    finally:
        (store.path / FILE).unlink(missing_ok=True)


def routed(store: Store, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[list[set[int]]]:
    """By token and routed layer, what compute's own routers choose."""
    seen: list[set[int]] = []
    route = experts.route

    def noted(*given: object) -> object:
        found = route(*given)  # type: ignore[arg-type]
        seen.append(set(found.ids[0].tolist()))
        return found

    with LocalDecoder(store) as decoder, monkeypatch.context() as patched:
        decoder.prefill(tokens[:1])
        patched.setattr(experts, "route", noted)
        for token in tokens[1:]:
            decoder.step(token)
    return [seen[at : at + 2] for at in range(0, len(seen), 2)]


def test_a_trace_of_every_expert_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = ("--model", str(store.path), "--text", str(tmp_path / "text"))
    assert run(monkeypatch, "record", str(tmp_path / "a.npz"), *text, "--set", "predictor.kind=all") == 2
    assert "leave out predictor.kind" in capfd.readouterr().err


@pytest.mark.ring
def test_a_ring_records_the_experts_of_each_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(3).integers(4, 200, (2, 12))
    trace = record(store, Config.parse({"compute": {"threads": 1}}), rows, {"text": "none"})
    assert (trace.layers, trace.tokens, trace.d_ff, trace.top_k) == (3, 2 * 10, 8, 3)
    assert trace.meta["text"] == "none"
    expected = [sets for row in rows.tolist() for sets in routed(store, row[:-1], monkeypatch)]
    for token, sets in enumerate(expected):
        for layer, wanted in zip((0, 2), sets, strict=True):
            assert set(np.flatnonzero(trace.masks(trace.used, layer)[token]).tolist()) == wanted
    assert not trace.masks(trace.used, 1).any()
