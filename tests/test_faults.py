"""Faults of workers, messages, reads and shared memory in a real ring: what happens, and that nothing stays.

The workers are those of `fault.py`. A ring either gives the text of a sound one, or an error that says what
is wrong; every test fails on what is left behind (`leaks.py`). docs/faults.md is the table.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import ring
from checkpoints import write_checkpoint
from fault import program

from pipeline.ring.plan import Plan
from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import DamagedStore, RingError
from storage.store import Store

pytestmark = pytest.mark.ring

WORKERS = ("predictor", "cache", "prefetcher", "compute")
CONFIG = ring.config(storage={"verify": "always"})
LOOK = 1.0  # seconds of silence before the watchdog looks; in less, answering it is itself work


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("faults")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="tiny")


@pytest.fixture(scope="module")
def plan(store: Store) -> Plan:
    return ring.plan_for(store, CONFIG)


@pytest.fixture(scope="module")
def sound(store: Store, plan: Plan) -> ring.Outcome:
    with Session(store, CONFIG, plan) as session:
        return ring.generate(session)


def outcome(store: Store, plan: Plan, worker: str, *faults: str) -> tuple[ring.Outcome, Session]:
    with Session(store, CONFIG, plan, programs=program(worker, *faults)) as session:
        session.watchdog.look_seconds = LOOK
        return ring.generate(session), session


# -- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_that_dies_at_its_start(store: Store, plan: Plan, worker: str) -> None:
    with pytest.raises(RingError, match=rf"the {worker} worker \(pid \d+\) was killed by SIGKILL"):
        Session(store, CONFIG, plan, programs=program(worker, "die:start"))


# What each sends, or receives, in a prompt, then in a token: messages of a prompt come first.
MOMENTS = {
    "predictor": ("NeuronsPredicted:1", "NeuronsPredicted:12"),
    "cache": ("LayerPart:1", "LayerPart:10"),
    "prefetcher": ("LayerPart:1", "LayerPart:8"),
    "compute": ("HiddenReady:2", "TokenReady:3"),
}


@pytest.mark.parametrize("moment", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_that_dies_at_work(store: Store, plan: Plan, worker: str, moment: int) -> None:
    with pytest.raises(RingError, match=rf"the {worker} worker \(pid \d+\) was killed by SIGKILL"):
        outcome(store, plan, worker, f"die:{MOMENTS[worker][moment]}")


@pytest.mark.parametrize("how", ["die", "hang"])
@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_that_dies_or_hangs_at_the_end(
    store: Store, plan: Plan, sound: ring.Outcome, worker: str, how: str
) -> None:
    """The answer is there already; the end takes its bounds and no longer."""
    found, session = outcome(store, plan, worker, f"{how}:Stop:1")
    assert found == sound
    assert not any(map(psutil.pid_exists, session.ring.pids.values()))


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_that_hangs(store: Store, plan: Plan, worker: str) -> None:
    """In compute the layers' thread hangs, which answers nobody; its process does."""
    hung = rf"the {worker} worker \(pid \d+\) hangs" if worker != "compute" else "the ring stands still"
    with pytest.raises(RingError, match=hung):
        outcome(store, plan, worker, f"hang:{MOMENTS[worker][1]}")


def test_a_worker_that_was_stopped_is_named_and_one_that_goes_on_is_waited_for(
    store: Store, plan: Plan, sound: ring.Outcome
) -> None:
    with Session(store, CONFIG, plan) as session:
        cache = session.ring.pids["cache"]
        session.watchdog.look_seconds = 10.0
        wanted = ring.GenerationParams(24, ring.Sampling(), ignore_eos=True)
        answer = session.pieces(ring.PROMPT, wanted)
        next(answer)
        os.kill(cache, signal.SIGSTOP)
        time.sleep(0.2)  # so that the ring has stood still
        os.kill(cache, signal.SIGCONT)
        list(answer)
        assert session.last is not None
        assert session.last.tokens == sound.tokens
        os.kill(cache, signal.SIGSTOP)
        session.watchdog.look_seconds = LOOK
        with pytest.raises(RingError, match=r"no statistics from \['cache'\]|cache worker .* is stopped"):
            session.ring.stats(timeout=1.0)


# -- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("predictor", "NeuronsPredicted:9"),
        ("cache", "ReadBundles:4"),
        ("prefetcher", "LayerPart:5"),
        ("compute", "HiddenReady:10"),  # the ninth only makes guesses
    ],
)
def test_a_lost_message_is_an_error_in_the_end(store: Store, plan: Plan, worker: str, message: str) -> None:
    with pytest.raises(RingError, match="the ring stands still"):
        outcome(store, plan, worker, f"lose:{message}")


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("predictor", "NeuronsPredicted:9"),
        ("cache", "ReadBundles:4"),
        ("prefetcher", "LayerPart:5"),
        ("compute", "HiddenReady:9"),
    ],
)
def test_a_message_that_comes_twice_never_changes_the_text(
    store: Store, plan: Plan, sound: ring.Outcome, worker: str, message: str
) -> None:
    try:
        assert outcome(store, plan, worker, f"twice:{message}")[0] == sound
    except RingError as error:
        assert "failed" in str(error) or "stands still" in str(error)  # noqa: PT017 - or else the same text


def test_late_messages_only_take_time(store: Store, plan: Plan, sound: ring.Outcome) -> None:
    late = ("delay:LayerPart:2", "delay:ReadBundles:3")
    assert outcome(store, plan, "cache", *late)[0] == sound


# -- reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["short", "eio-once", "eagain", "flip-once", "slow-once"])
def test_reads_that_may_succeed_do(store: Store, plan: Plan, sound: ring.Outcome, fault: str) -> None:
    found, _ = outcome(store, plan, "prefetcher", fault)
    assert found == sound


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("eio", r"reading layer \d+, neuron \d+ from .*bundles\.bin failed: Input/output error"),
        ("flip", r"the bundle of layer \d+, neuron \d+, at byte [\d,]+, does not match its checksum"),
    ],
)
def test_reads_that_fail_for_good_name_the_place(store: Store, plan: Plan, fault: str, words: str) -> None:
    with pytest.raises(DamagedStore, match=words):
        outcome(store, plan, "prefetcher", fault)


def test_a_slow_disk_is_waited_for_and_told(
    store: Store, plan: Plan, sound: ring.Outcome, capfd: pytest.CaptureFixture[str]
) -> None:
    """Reads that take many looks of the watchdog: no worker is dead, and the user hears why nothing comes."""
    found, _ = outcome(store, plan, "prefetcher", "slow-once")
    assert found == sound
    assert "reads are waited for; all workers are alive" in capfd.readouterr().err


# -- shared memory --------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_table_is_an_error(store: Store, plan: Plan) -> None:
    with pytest.raises(RingError, match="the prefetcher worker failed"):
        outcome(store, plan, "cache", "table")


def test_words_for_faults_are_checked() -> None:
    """A misspelt fault would be a test that cannot fail."""
    import fault

    with pytest.raises(AssertionError, match="shrt"):
        fault.Faults().take(["shrt"])


def sequence_of_programs() -> Sequence[str]:
    return program("cache", "table")["cache"]


def test_a_fault_is_a_program_of_its_own() -> None:
    assert Path(sequence_of_programs()[1]).name == "fault.py"
