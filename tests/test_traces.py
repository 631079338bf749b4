"""Traces and their replay: exact window accounting, policies, the ring's own cache."""

from __future__ import annotations

import itertools
import json

import numpy as np
import predictors
import pytest
import torch
from checkpoints import write_checkpoint
from ring import config

from pipeline import ending
from pipeline.cli import main
from pipeline.config import Cache
from pipeline.planner import rates
from pipeline.planner.pace import Rates
from pipeline.ring.messages import NeuronsPredicted, Step
from pipeline.ring.plan import Forecast, Plan
from storage.convert import convert
from storage.errors import StoreError
from storage.store import Store
from workers.cache.frequency import RecentlyFrequent
from workers.cache.layers import LayerCache
from workers.cache.policies import make_policy
from workers.cache.policy import KeepNothing, WindowThenOldest
from workers.cache.residency import Residency
from workers.lab.offline import replay
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.policies import Belady, PinnedThenOldest
from workers.lab.offline.record import record
from workers.lab.offline.trace import Trace, pack
from workers.lab.traces import __main__ as traces
from workers.lab.traces import placement
from workers.lab.traces.activity import activity
from workers.lab.traces.order import linear_order
from workers.lab.traces.windows import windows

LAYERS, D_FF, TOKENS = 2, 44, 90


def random_masks(seed: int, share: float = 0.1) -> np.ndarray:
    """`[layers, tokens, d_ff]`: some neurons are often used, and the last token's tend to stay."""
    generator = np.random.default_rng(seed)
    odds = share * generator.exponential(size=(LAYERS, 1, D_FF))
    masks = generator.random((LAYERS, TOKENS, D_FF)) < odds
    masks[:, 1:] |= masks[:, :-1] & (generator.random((LAYERS, TOKENS - 1, D_FF)) < 0.4)
    return masks


def make_trace(seed: int = 0, guesses: bool = False) -> Trace:
    active = pack(random_masks(seed))
    guessed = pack(random_masks(seed) & random_masks(seed + 1, 8.0)) if guesses else None
    return Trace(D_FF, 512, active, active if guesses else None, guessed, {"store": "none"})


@pytest.mark.parametrize("command", ["replay", "activity"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trace", command, "no.npz", "--picture", "/nowhere/picture.png"])
    assert traces.run() == ending.WRONG_USE
    assert "there is no directory /nowhere" in capsys.readouterr().err


# -- the file -------------------------------------------------------------------------------------


def test_a_trace_survives_the_disk(tmp_path):
    trace = make_trace(guesses=True)
    trace.save(tmp_path / "a.npz")
    found = Trace.load(tmp_path / "a.npz")
    assert (found.d_ff, found.stride, found.meta) == (D_FF, 512, {"store": "none"})
    assert (found.active == trace.active).all()
    assert (found.guessed == trace.guessed).all()
    assert (found.masks(found.used, 1) == random_masks(0)[1]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [b"", b"no trace", b"PK\x03\x04 no trace"])
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(StoreError, match="is not a trace"):
        Trace.load(tmp_path / "a.npz")


def test_a_trace_whose_arrays_do_not_fit_is_refused(tmp_path):
    trace = make_trace()
    Trace(200, 512, trace.active, None, None, {}).save(tmp_path / "a.npz")
    with pytest.raises(StoreError, match="do not fit"):
        Trace.load(tmp_path / "a.npz")


# -- windows --------------------------------------------------------------------------------------


def test_union_and_new_neurons_are_exact():
    trace, longest = make_trace(), 4
    masks = random_masks(0)
    for found in windows(trace, longest):
        unions = [masks[:, t - found.k + 1 : t + 1].any(axis=1).mean() for t in range(longest, TOKENS)]
        new = [(masks[:, t] & ~masks[:, t - found.k : t].any(axis=1)).mean() for t in range(longest, TOKENS)]
        assert found.union == pytest.approx(np.mean(unions))
        assert found.new == pytest.approx(np.mean(new))
        assert found.new > 0


# -- policies -------------------------------------------------------------------------------------


def outcomes(trace: Trace, slots: int) -> dict[str, replay.Outcome]:
    made = replay.policies(trace, make_trace(seed=5), [3], [4.0, 16.0])
    return {name: replay.replay(trace, [slots] * LAYERS, make) for name, make in made.items()}


@pytest.mark.parametrize("slots", [14, 20, 30])
def test_nothing_beats_belady(slots):
    found = outcomes(make_trace(), slots)
    assert len({outcome.wanted for outcome in found.values()}) == 1
    assert all(found["Belady"].hits >= outcome.hits for outcome in found.values())
    assert found["Belady"].hits > found["LRU"].hits


def best_hits(masks: np.ndarray, slots: int) -> int:
    """The most hits of any choice of victims, by trying all."""
    states = {frozenset[int](): 0}
    for row in masks:
        wanted = frozenset(np.flatnonzero(row).tolist())
        following: dict[frozenset[int], int] = {}
        for resident, hits in states.items():
            others = sorted(resident - wanted)
            kept = min(len(others), slots - len(wanted))
            for some in itertools.combinations(others, kept):
                state = wanted | frozenset(some)
                following[state] = max(following.get(state, 0), hits + len(resident & wanted))
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(5))
def test_belady_is_the_optimum(seed):
    masks = np.random.default_rng(seed).random((12, 8)) < 0.3
    masks[masks.sum(axis=1) > 4] = False
    trace = Trace(8, 512, pack(masks)[None], None, None, {})
    found = replay.replay(trace, [4] * LAYERS, lambda layer, slots: Belady(masks))
    assert found.hits == best_hits(masks, 4)


def test_window_zero_and_a_tiny_half_life_are_lru():
    trace = make_trace()
    lru = replay.replay(trace, [16] * LAYERS, lambda layer, slots: WindowThenOldest(D_FF, 0))
    tiny = replay.replay(trace, [16] * LAYERS, lambda layer, slots: RecentlyFrequent(D_FF, 0, 1e-2))
    assert tiny == lru
    assert make_policy(D_FF, Cache(half_life=0)).__class__ is WindowThenOldest
    assert make_policy(D_FF, Cache(keep=False)).__class__ is KeepNothing


def test_the_rarely_used_leaves_first():
    residency = Residency(6, 3, RecentlyFrequent(6, 0, 1e6))
    for step, ids in enumerate(([0, 1], [0], [1], [2], [3])):
        replay.turn(residency, step, np.array(ids), None)
    assert set(residency.id_of.tolist()) == {0, 1, 3}


def test_half_life_forgets():
    residency = Residency(6, 2, RecentlyFrequent(6, 0, 1.0))
    for step, ids in enumerate(([0], [0], [0], [0], [], [], [], [], [1], [2])):
        replay.turn(residency, step, np.array(ids, np.intp), None)
    assert set(residency.id_of.tolist()) == {1, 2}


def test_hot_neurons_stay_beyond_the_window():
    hot = np.zeros(6, np.bool_)
    hot[0] = True
    residency = Residency(6, 3, PinnedThenOldest(6, 1, hot))
    for step, ids in enumerate(([0, 1], [2], [3], [4], [5])):
        replay.turn(residency, step, np.array(ids), None)
    assert 0 in residency.id_of
    assert 1 not in residency.id_of


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("half_life", [0.0, 8.0])
def test_replay_reads_what_the_rings_cache_reads(guesses, half_life):
    """The same sets through the cache worker's own state machine: as many hits and reads."""
    trace, slots, settings = make_trace(guesses=guesses), 24, Cache(half_life=half_life)
    plan = Plan(64, (D_FF,) * LAYERS, 512, (slots,) * LAYERS, D_FF, 128, 1, Forecast("lowrank", 1, guesses))
    table = np.zeros((LAYERS, 2, D_FF), np.int32)
    cache = LayerCache(plan, table, table.copy(), lambda layer: make_policy(D_FF, settings))
    sets = [(trace.guessed, True), (trace.used, False)] if guesses else [(trace.used, False)]
    for step, layer in itertools.product(range(TOKENS), range(LAYERS)):
        for bits, guess in sets:
            ids = np.flatnonzero(trace.masks(bits, layer)[step])
            done = (step - 1) * LAYERS + layer
            now = Step(step, step, 1, every=False)
            cache.handle(NeuronsPredicted(1, now, layer, guess, False, ids.size, 0, None, done), ids)
    found = replay.replay(trace, [slots] * LAYERS, lambda layer, slots: make_policy(D_FF, settings))
    counted = cache.stats()
    assert counted["staged"] == 0
    assert (found.hits, found.reads) == (counted["decode_hits"], counted["decode_misses"])
    assert found.wasted == counted["decode_wasted"]
    assert found.hits > 0


# -- recording ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("traces")
    made = convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")
    layers = range(len(made.layout.layers))
    tensors = predictors.maps(made, "layers", layers, seed=1) | predictors.maps(
        made, "inlayer", layers, seed=2
    )
    predictors.write(made, tensors)
    return made


def recorded(store: Store, tokens: np.ndarray, **predictor: object) -> Trace:
    with DenseModel(store, 1) as model, torch.no_grad():
        return record(model, make_chooser(store, config(predictor=predictor)), tokens, {})


def test_a_dense_trace_is_what_is_active(store):
    tokens = np.random.default_rng(0).integers(4, 260, (2, 20))
    trace = recorded(store, tokens, kind="all", refine=False)
    assert (trace.predicted, trace.guessed) == (None, None)
    oracle = recorded(store, tokens, kind="oracle")
    assert (oracle.active == trace.active).all()
    assert oracle.predicted is not None
    assert (trace.active & ~oracle.predicted == 0).all()
    share = np.bitwise_count(trace.active).sum() / (trace.tokens * trace.layers * trace.d_ff)
    assert 0.2 < share < 0.8


def test_predicted_sets_and_guesses_are_recorded(store):
    tokens = np.random.default_rng(0).integers(4, 260, (2, 20))
    trace = recorded(store, tokens, kind="lowrank", lookahead=1, refine=True)
    early = recorded(store, tokens, kind="lowrank", lookahead=1, refine=False)
    assert trace.predicted is not None
    assert trace.guessed is not None
    assert early.guessed is None
    # The embedding, and so layer 0's guess, does not depend on what was computed.
    assert (trace.guessed[0] == early.predicted[0]).all()
    assert (trace.predicted[0] != early.predicted[0]).any()


def run(monkeypatch, *arguments: str) -> int:
    """In this process: to start one with torch takes two seconds."""
    monkeypatch.setattr("sys.argv", ["trace", *arguments])
    return traces.run()


def test_the_commands(store, tmp_path, monkeypatch, capfd):
    text, out, picture = tmp_path / "text.txt", str(tmp_path / "a.npz"), tmp_path / "a.png"
    text.write_text("Once upon a time there was a small model. " * 20, encoding="utf-8")
    options = ("--model", str(store.path), "--text", str(text), "--threads", "1", "--tokens", "256")
    assert run(monkeypatch, "record", out, *options) == 0
    assert Trace.load(tmp_path / "a.npz").tokens == 256
    assert "256 tokens (2 rows of 128), 3 layers" in capfd.readouterr().err
    skipped = str(tmp_path / "b.npz")
    assert run(monkeypatch, "record", skipped, *options[:-1], "128", "--skip", "100") == 0
    assert "128 tokens (one row), 3 layers" in capfd.readouterr().err
    assert run(monkeypatch, "record", skipped, *options, "--skip", "5000") == 2
    assert "too few for a row" in capfd.readouterr().err
    options = ("--capacities", "0.5,0.7", "--half-lives", "8", "--picture", str(picture), "--json")
    assert run(monkeypatch, "replay", out, *options) == 0
    found = json.loads(capfd.readouterr().out)
    assert {one["policy"] for one in found["policies"]} >= {"LRU", "LFU", "LRFU 8", "window 5", "Belady"}
    assert [one["k"] for one in found["windows"]] == list(range(1, 9))
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("replay", "missing.npz"), "missing.npz cannot be read: No such file or directory"),
        (("replay", "text.txt"), "is not a trace"),
        (("replay", "a.npz", "--capacities", "much"), "no list of positive numbers"),
        (("replay", "a.npz", "--capacities", "nan"), "no list of positive numbers"),
        (("replay", "a.npz", "--windows", "inf"), "no list of positive numbers"),
        (("record", "nowhere/a.npz", "--text", "text.txt"), "there is no directory nowhere"),
        (("replay", "a.npz", "--warm-up", "85"), "has only 90 tokens"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, monkeypatch, capfd, arguments, reason):
    make_trace().save(tmp_path / "a.npz")
    (tmp_path / "text.txt").write_text("Once upon a time", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    said = capfd.readouterr().err
    assert reason in said
    assert "Traceback" not in said
    assert "[Errno" not in said


# -- order and placement --------------------------------------------------------------------------


def paired_masks(seed: int, tokens: int = 120, d_ff: int = 24) -> np.ndarray:
    """Neurons i and i + 12 are always used together; few pairs a token."""
    pairs = np.random.default_rng(seed).random((tokens, d_ff // 2)) < 0.15
    return np.concatenate((pairs, pairs), axis=1)


def paired_trace(seed: int) -> Trace:
    return Trace(24, 512, pack(paired_masks(seed))[None], None, None, {})


def test_neurons_that_are_used_together_lie_together():
    (order,) = linear_order(paired_trace(0))
    assert order.dtype == np.int32
    assert sorted(order) == list(range(24))
    place = np.argsort(order)
    assert (np.abs(place[:12] - place[12:]) == 1).all()


def test_unused_neurons_are_placed_as_well():
    masks = paired_masks(0)
    masks[:, [3, 15, 20]] = False
    (order,) = linear_order(Trace(24, 512, pack(masks)[None], None, None, {}))
    assert sorted(order) == list(range(24))


def lru(layer: int, slots: int) -> WindowThenOldest:
    return WindowThenOldest(24, 0)


def reading(size: float) -> float:
    """Of a disk that gives 1,000 reads a second, however large."""
    return 1000 * size


def test_an_order_joins_reads_and_reads_the_same():
    trace, order = paired_trace(1), linear_order(paired_trace(0))
    plain = placement.ordered("", trace, 10, lru, None, reading)
    placed = placement.ordered("", trace, 10, lru, order, reading)
    assert [one.seconds * 1000 for one in (plain, placed)] == pytest.approx([plain.requests, placed.requests])
    steady = placement.ordered("", trace, 10, lru, order, lambda size: 1000.0)
    assert steady.seconds * 1000 == pytest.approx(placed.bytes)
    assert (placed.bundles, placed.bytes) == (plain.bundles, plain.bytes)
    assert placed.requests <= placed.bundles / 2 < plain.requests
    wide = placement.ordered("", trace, 10, lru, None, reading, gap=24)
    assert wide.requests < plain.requests
    assert wide.bytes > plain.bytes
    assert wide.redundant == pytest.approx(1 - plain.bytes / wide.bytes)


def test_bundled_friends_help_only_where_they_are_each_others():
    """Pairs halve the bundles. With one hot neuron, everyone's friend, it is read again and again."""
    trace, made = paired_trace(1), (paired_trace(0), 10, lru, reading)
    paired = placement.befriended("", trace, *made)
    alone = placement.ordered("", trace, 10, lru, None, reading)
    assert paired.redundant < 0.1  # half a pair may have been evicted
    assert paired.bundles < 0.6 * alone.bundles
    assert paired.bytes == pytest.approx(alone.bytes, rel=0.1)
    hot = random_masks(0)[0, :, :24].copy()
    hot[:, 0] = True
    lonely = Trace(24, 512, pack(hot)[None], None, None, {})
    bundled = placement.befriended("", lonely, lonely, 10, lru, reading)
    plain = placement.ordered("", lonely, 10, lru, None, reading)
    assert bundled.seconds * 1000 == pytest.approx(bundled.requests)
    assert bundled.redundant > 0.4
    assert bundled.bytes > 1.5 * plain.bytes


def test_order_and_conversion_by_commands(tmp_path, monkeypatch, capfd):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "opt", "float16")
    masks = np.random.default_rng(0).random((3, 50, 192)) < 0.2
    Trace(192, 512, pack(masks), None, None, {}).save(tmp_path / "a.npz")
    order, store = str(tmp_path / "coactive.npy"), str(tmp_path / "store")
    assert run(monkeypatch, "order", str(tmp_path / "a.npz"), order) == 0
    assert f"convert MODEL STORE --order {order}" in capfd.readouterr().err
    monkeypatch.setattr("sys.argv", ["run.py", "convert", str(checkpoint), store, "--order", order])
    assert main() == 0
    made = Store.open(tmp_path / "store")
    plain = convert(checkpoint, tmp_path / "plain", name="small")
    assert made.manifest.order == "coactive"
    assert (made.read_layer(2) == plain.read_layer(2)).all()
    assert (tmp_path / "store/bundles.bin").read_bytes() != (tmp_path / "plain/bundles.bin").read_bytes()
    disk = Rates(1, 1e9, {}, 0.0, 0.0, 1e9, 1e9, ((512, 1e6), (4096, 8e6)), 8e6, 1e-4)
    monkeypatch.setattr(rates, "measured", lambda say: disk)
    assert run(monkeypatch, "placement", str(tmp_path / "a.npz"), "--earlier", str(tmp_path / "a.npz")) == 0
    assert "redundant" in capfd.readouterr().out
    (tmp_path / "bad.npy").write_bytes(b"no array")
    monkeypatch.setattr(
        "sys.argv", ["run.py", "convert", str(checkpoint), store + "2", "--order", str(tmp_path / "bad.npy")]
    )
    assert main() == 2
    assert "is no neuron order" in capfd.readouterr().err


def test_activity_by_layer_averages_to_the_traces_own() -> None:
    generator = np.random.default_rng(3)
    bits = np.stack([pack(generator.random((40, 64)) < share) for share in (0.1, 0.4)])
    trace = Trace(d_ff=64, stride=512, active=bits, predicted=None, guessed=None, meta={})
    layers, mean = activity(trace, 3), windows(trace, 3)
    for k in range(3):
        assert np.mean([layer.windows[k].union for layer in layers]) == pytest.approx(mean[k].union)
        assert np.mean([layer.windows[k].new for layer in layers]) == pytest.approx(mean[k].new)
    assert layers[0].used < layers[1].used
    counted = np.unpackbits(bits[0], axis=1, bitorder="little")[3:].mean()
    assert layers[0].used == pytest.approx(counted)
