"""`python -m workers.cache` and `workers.predictor`, driven as the supervisor and their peers do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import predictors
import pytest
from stores import bundle_store

from pipeline.config import Config
from pipeline.planner.resolve import resolve
from pipeline.ring import segments
from pipeline.ring.channel import Channel
from pipeline.ring.messages import (
    EMBEDDING,
    PROTOCOL_VERSION,
    Failed,
    HiddenReady,
    LayerPart,
    Message,
    NeuronsPredicted,
    PartDone,
    ReadBundles,
    ReportStats,
    RingReady,
    Stats,
    Step,
    Stop,
    WorkerReady,
)
from pipeline.ring.plan import Plan
from pipeline.ring.process import ORPHANED, WorkerSpec
from storage.store import Store

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds; only a broken worker takes them


class Driven:
    """One worker process and the inboxes of everybody it speaks to."""

    def __init__(
        self, name: str, channel: Channel, shared: segments.Segments, process: subprocess.Popen[bytes]
    ) -> None:
        self.name, self.channel, self.shared, self.process = name, channel, shared, process

    def send(self, message: Message) -> None:
        self.channel.send(self.name, message)

    def receive(self, inbox: str) -> Message | None:
        return self.channel.receive(inbox, PATIENCE)

    def stop(self) -> int:
        self.send(Stop())
        return self.process.wait(PATIENCE)


@contextmanager
def driven(
    name: str, store: Store, tmp_path: Path, inboxes: tuple[str, ...], **sections: dict[str, Any]
) -> Iterator[Driven]:
    layout = store.layout
    config = Config.parse(sections)
    plan = Plan(
        d_model=store.architecture.d_model,
        units=layout.units,
        stride=layout.stride,
        slots=(6,) * len(layout.layers),
        staging=4,
        context=16,
        hidden_rows=2,
        forecast=resolve(store, config).forecast,
    )
    directory = tmp_path / "ring"
    directory.mkdir()
    descriptors = segments.create(plan)
    spec = WorkerSpec(
        name,
        str(directory),
        str(store.path),
        store.identity,
        config.model_dump(),
        plan.to_json(),
        descriptors,
        routes={},
    )
    with Channel(directory, ("supervisor", *inboxes)) as channel:
        process = subprocess.Popen(
            [sys.executable, "-m", f"workers.{name}"],
            stdin=subprocess.PIPE,
            pass_fds=tuple(descriptors.values()),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            shared = segments.attach(plan, descriptors)
            for descriptor in descriptors.values():
                os.close(descriptor)
            assert process.stdin is not None
            spec.write(process.stdin)
            yield Driven(name, channel, shared, process)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return bundle_store(tmp_path / "store", layers=3, d_ff=12, d_model=128)


def test_the_cache_turns_predictions_into_reads_and_schedules(store, tmp_path):
    with driven("cache", store, tmp_path, ("compute", "prefetcher")) as cache:
        assert cache.receive("supervisor") == WorkerReady("cache", cache.process.pid, PROTOCOL_VERSION, ())
        cache.send(RingReady())
        token, prompt = Step(0, 4, 1, every=False), Step(1, 0, 5, every=True)
        cache.shared.predicted[1, 1, :3] = [2, 5, 7]
        cache.send(NeuronsPredicted(0, token, 1, True, False, certain=3, doubtful=0, keep=None, done=-1))
        assert cache.receive("prefetcher") == ReadBundles(0, token, 1, 1, 0, 3, True)
        assert cache.shared.reads[1, :, :3].tolist() == [[2, 5, 7], [6, 7, 8]]
        cache.shared.predicted[1, 0, :2] = [5, 9]
        cache.send(NeuronsPredicted(0, token, 1, False, False, certain=2, doubtful=0, keep=None, done=-1))
        schedule = cache.receive("compute")
        assert schedule == LayerPart(0, 0, 1, 0, (0, 1, 1), (False, False, True), False)
        assert cache.receive("prefetcher") == ReadBundles(0, token, 1, 2, 3, 1, False)
        assert cache.shared.wanted[1, :, :2].tolist() == [[5, 9], [7, 9]]
        cache.send(NeuronsPredicted(0, prompt, 2, False, True, certain=0, doubtful=0, keep=None, done=2))
        assert cache.receive("prefetcher") == ReadBundles(0, prompt, 2, 1, 0, 10, False)
        assert cache.receive("prefetcher") == ReadBundles(0, prompt, 2, 2, 10, 2, False)
        cache.send(PartDone(0, 1, 2, 1))
        cache.send(ReportStats(4))
        stats = cache.receive("supervisor")
        assert isinstance(stats, Stats)
        assert (stats.serial, stats.name) == (4, "cache")
        assert stats.values["decode_misses"] == 4
        assert stats.values["decode_wasted"] == 2
        assert stats.values["stream_misses"] == 12
        assert stats.values["staged"] == 6
        assert stats.values["layer.1.misses"] == 4
        assert cache.stop() == 0


def test_the_cache_fails_aloud_on_a_broken_invariant(store, tmp_path):
    with driven("cache", store, tmp_path, ()) as cache:
        cache.receive("supervisor")
        cache.send(PartDone(0, 0, 0, 1))
        failed = cache.receive("supervisor")
        assert isinstance(failed, Failed)
        assert "no staging half" in failed.error
        assert cache.process.wait(PATIENCE) == 1


@pytest.mark.parametrize("name", ["cache", "predictor"])
def test_a_worker_leaves_with_its_supervisor(name, store, tmp_path):
    with driven(name, store, tmp_path, (), predictor={"kind": "all"}) as worker:
        worker.receive("supervisor")
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait(PATIENCE) == ORPHANED
        worker.process.stdin = None


def test_the_predictor_of_kind_all(store, tmp_path):
    with driven("predictor", store, tmp_path, ("cache",), predictor={"kind": "all"}) as predictor:
        assert isinstance(predictor.receive("supervisor"), WorkerReady)
        prompt = Step(8, 0, 3, every=True)
        predictor.send(HiddenReady(3, prompt, EMBEDDING, 1, done=5))
        assert predictor.receive("cache") == NeuronsPredicted(3, prompt, 0, False, True, 0, 0, None, 5)
        assert predictor.stop() == 0


def test_the_predictor_with_trained_maps(store, tmp_path):
    maps = predictors.maps(store, "layers", range(3)) | predictors.maps(store, "inlayer", range(3), seed=6)
    predictors.write(store, maps)
    with driven("predictor", store, tmp_path, ("cache",)) as predictor:  # auto becomes lowrank
        assert isinstance(predictor.receive("supervisor"), WorkerReady)
        x = np.random.default_rng(0).normal(size=128).astype(np.float32)
        predictor.shared.hidden[2, 0] = x
        token = Step(4, 20, 1, every=False)
        predictor.send(HiddenReady(0, token, 1, 1, done=9))
        for layer, guess, prefix in ((1, False, "inlayer"), (2, True, "layers")):
            down, up, bias = (
                maps[f"{prefix}.{layer}.{name}"].astype(float) for name in ("down", "up", "bias")
            )
            expected = np.flatnonzero(up @ (down @ (0.5 * x)) + bias > 0)
            sent = predictor.receive("cache")
            assert sent == NeuronsPredicted(0, token, layer, guess, False, expected.size, 0, None, 9)
            written = predictor.shared.predicted[layer, int(guess), : expected.size]
            assert written.tolist() == expected.tolist()
        predictor.send(ReportStats(1))
        stats = predictor.receive("supervisor")
        assert isinstance(stats, Stats)
        assert stats.values["calls"] == 1
        assert stats.values["layer.1.predicted"] > 0
        assert predictor.stop() == 0


def test_the_predictor_refuses_maps_of_other_weights(store, tmp_path):
    predictors.write(store, predictors.maps(store, "layers", range(3)), changes={"store": "f" * 32})
    with driven("predictor", store, tmp_path, ()) as predictor:
        failed = predictor.receive("supervisor")
        assert isinstance(failed, Failed)
        assert "trained for other weights" in failed.error
        assert predictor.process.wait(PATIENCE) == 1
