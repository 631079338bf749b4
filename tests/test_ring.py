"""The whole ring, four real processes, on small random models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import predictors
import pytest
from checkpoints import write_checkpoint
from ring import PROMPT, alike, config, generate, outcome, plan_for, tap

from pipeline.ring.channel import Channel
from pipeline.ring.generation import GenerationParams
from pipeline.ring.messages import Cancel, Finished, Generate, LayerPart, Message, ReadBundles
from pipeline.ring.session import Session
from storage.convert import convert
from storage.store import Store

pytestmark = pytest.mark.ring


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small ReLU model, every parameter random."""
    base = tmp_path_factory.mktemp("ring")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("falcon")
    checkpoint = write_checkpoint(base / "checkpoint", "falcon-relu", "bfloat16")
    return convert(checkpoint, base / "store", name="falcon")


@pytest.fixture(scope="module")
def reference(store: Store):
    """What the model writes with all neurons."""
    return outcome(store, config(predictor={"kind": "all", "refine": False}))


@pytest.fixture(scope="module")
def sets(store: Store):
    """What it writes with the oracle's sets, all in slots."""
    return outcome(store, config(cache={"share": 1.0}))


def test_oracle_equals_all_bit_for_bit(sets, reference):
    assert alike(sets, reference)


def test_oracle_equals_all_bit_for_bit_on_falcon(falcon):
    everything = outcome(falcon, config(predictor={"kind": "all", "refine": False}))
    assert alike(outcome(falcon, config()), everything)


# Several in one ring, since the start of a ring is what takes time.
@pytest.mark.parametrize(
    "changes",
    [
        {"prefetcher": {"readers": 4, "max_gap": 1 << 14}},
        {"prefetcher": {"backend": "threads"}, "compute": {"threads": 2, "context": 128}},
        {"prefetcher": {"backend": "aiofiles"}, "predictor": {"lookahead": 0}},
        {"prefetcher": {"direct": False}},
        {"predictor": {"lookahead": 2}, "cache": {"window": 2}},
    ],
    ids=str,
)
def test_text_does_not_depend_on_how_it_is_made(store, sets, changes):
    assert outcome(store, config(**changes)) == sets


def test_a_pinned_layer_is_computed_whole(store, reference):
    assert alike(outcome(store, config(predictor={"pinned_layers": (0,)})), reference)


@pytest.mark.parametrize(("slots", "staging"), [(8, 8), (1, 3), (30, 256)])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_cache_smaller_than_one_layers_set(store, sets, slots, staging, lookahead):
    chosen = config(predictor={"lookahead": lookahead})
    assert outcome(store, chosen, slots, staging) == sets


def test_everything_through_staging(store, reference):
    chosen = config(predictor={"kind": "all", "refine": False})
    assert outcome(store, chosen, slots=0, staging=5) == reference


def test_history_does_not_change_the_text(store, sets):
    chosen = config()
    with Session(store, chosen, plan_for(store, chosen, slots=40)) as session:
        generate(session, prompt=[2, 5, 5, 5])
        for _ in session.generate([2, 90, 3], GenerationParams(max_new_tokens=50, ignore_eos=True)):
            break  # abandoned: cancelled and drained
        assert generate(session) == sets


def test_cancel_during_prefill_drains_the_ring(store, sets):
    chosen = config()
    with Session(store, chosen, plan_for(store, chosen, slots=10, staging=7)) as session:
        session.ring.send("compute", long_generation(run=1000))
        session.ring.send("compute", Cancel(1000))
        message = session.ring.receive(60)
        while not isinstance(message, Finished):
            message = session.ring.receive(60)
        assert message.reason == "cancelled"
        assert generate(session) == sets


def long_generation(run: int) -> Generate:
    return Generate(
        run=run,
        prompt=tuple(PROMPT * 15),
        max_new_tokens=30,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop_tokens=(),
        forced=(),
    )


def test_sampling_is_decided_by_the_seed(store):
    chosen = config()
    with Session(store, chosen, plan_for(store, chosen)) as session:
        first = generate(session, temperature=1.0, top_k=50, top_p=0.9, seed=7)
        again = generate(session, temperature=1.0, top_k=50, top_p=0.9, seed=7)
        other = generate(session, temperature=1.0, top_k=50, top_p=0.9, seed=8)
    assert first == again
    assert first.tokens != other.tokens


class Withholder:
    """Keeps the last part of a layer back until reads for the next layer have been asked for."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.schedules: dict[tuple[int, int], int] = {}
        self.held: list[LayerPart] = []
        self.asked: set[tuple[int, int]] = set()
        self.released = 0

    def __call__(self, inbox: str, message: Message, channel: Channel) -> None:
        if inbox == "prefetcher":
            if isinstance(message, ReadBundles):
                self.asked.add((message.step.number, message.layer))
            channel.send("prefetcher", message)
        elif isinstance(message, LayerPart):
            if message.part == 0:
                self.schedules[message.step, message.layer] = len(message.counts) - 1
            self.held.append(message)
        else:
            channel.send("compute", message)
        self.release(channel)

    def may_pass(self, part: LayerPart) -> bool:
        last = self.schedules.get((part.step, part.layer))
        if last is None or part.part < last or part.layer == self.layers - 1 or part.step == 0:
            return True
        return (part.step, part.layer + 1) in self.asked

    def release(self, channel: Channel) -> None:
        for part in [part for part in self.held if self.may_pass(part)]:
            self.held.remove(part)
            self.released += part.part > 0
            channel.send("compute", part)


def overlapped_tokens(store: Store, lookahead: int, seconds: float) -> tuple[int, Withholder]:
    """Tokens that came out of a ring whose last parts wait for the next layer's reads."""
    chosen = config(predictor={"lookahead": lookahead, "refine": lookahead > 0})
    # Half of the neurons fit: every layer of every token has to read.
    plan = plan_for(store, chosen, slots=100)
    withholder = Withholder(plan.layers)
    routes = {"compute": "tap-compute", "prefetcher": "tap-prefetcher"}
    with Session(store, chosen, plan, routes) as session:
        session.token_seconds = seconds
        with tap(session.ring.directory, ("compute", "prefetcher"), withholder):
            try:
                return len(generate(session, count=6).tokens), withholder
            except Exception:
                assert session.last is not None
                return len(session.last.tokens), withholder


def test_the_next_layers_reads_overlap_this_layers_compute(store):
    tokens, withholder = overlapped_tokens(store, lookahead=1, seconds=60)
    assert tokens == 6
    assert withholder.released > 0


def test_without_lookahead_nothing_overlaps(store):
    tokens, withholder = overlapped_tokens(store, lookahead=0, seconds=2)
    assert tokens < 6
    assert withholder.held


def test_only_what_was_asked_for_is_read(store):
    chosen = config(prefetcher={"max_gap": 4096})
    with Session(store, chosen, plan_for(store, chosen, slots=60)) as session:
        pid = session.ring.pids["prefetcher"]
        generate(session, count=2)
        before = kernel_bytes(pid)
        counted_before = session.ring.stats()
        generate(session, count=12)
        counted = dict(session.ring.stats().items())
        kernel = kernel_bytes(pid) - before
    stride = store.layout.stride

    def grown(worker: str, name: str) -> float:
        return counted[worker][name] - counted_before[worker][name]

    assert grown("cache", "decode_misses") > 0
    ours = grown("prefetcher", "decode_bytes")
    assert ours == grown("cache", "decode_misses") * stride + grown("prefetcher", "decode_gap_bytes")
    assert kernel == ours + grown("prefetcher", "stream_bytes")


def kernel_bytes(pid: int) -> int:
    """Bytes that the kernel fetched from storage for this process."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("no read_bytes in /proc/PID/io")


@pytest.fixture(scope="module")
def doubting(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small model whose random predictors have thresholds by residency, the same in every layer."""
    base = tmp_path_factory.mktemp("doubting")
    made = convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")
    layers = range(len(made.layout.layers))
    maps = predictors.maps(made, "layers", layers) | predictors.maps(made, "inlayer", layers, seed=2)
    for layer in layers:
        maps[f"inlayer.{layer}.resident"] = np.array([-0.5], np.float32)
        maps[f"inlayer.{layer}.absent"] = np.array([0.75], np.float32)
    predictors.write(made, maps)
    return made


@pytest.mark.parametrize(
    ("share", "keep", "threshold"), [(1.0, True, -0.5), (0.5, False, 0.75)], ids=["all", "nothing"]
)
def test_cache_aware_is_one_threshold_where_all_or_nothing_is_resident(doubting, share, keep, threshold):
    cache = {"share": share, "keep": keep}
    aware = config(predictor={"kind": "lowrank", "lookahead": 0, "cache_aware": True}, cache=cache)
    plain = config(predictor={"kind": "lowrank", "lookahead": 0, "threshold": threshold}, cache=cache)
    found = outcome(doubting, aware)
    assert found == outcome(doubting, plain)
    assert found != outcome(doubting, config(predictor={"kind": "lowrank", "lookahead": 0}, cache=cache))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_cache_aware_is_repeatable(doubting, lookahead):
    chosen = config(predictor={"kind": "lowrank", "lookahead": lookahead, "cache_aware": True})
    assert outcome(doubting, chosen, slots=60) == outcome(doubting, chosen, slots=60)
