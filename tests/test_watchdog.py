"""The watchdog without a ring: it waits for a slow disk, and for nobody who is hung."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline.ring.messages import Stats
from pipeline.ring.watchdog import HUNG_LOOKS, STILL_LOOKS, Watchdog
from storage.errors import RingError

LOOK = 10.0  # seconds
WORKERS = ("predictor", "cache", "prefetcher", "compute")


class Ring:
    """Four workers that answer or do not; all are one process that sleeps."""

    def __init__(self, process: int) -> None:
        self.said: list[str] = []
        self.serial = 0
        self.silent: set[str] = set()  # who answers nothing
        self.reading = {"in_flight": 0.0, "backlog": 0.0, "wakes": 0.0}
        self.dog = Watchdog(dict.fromkeys(WORKERS, process), self.ask, self.said.append, LOOK)

    def ask(self) -> int:
        self.serial += 1
        for name in WORKERS:
            if name not in self.silent:
                self.dog.counted(Stats(self.serial, name, self.reading if name == "prefetcher" else {}))
        return self.serial

    def wait(self, looks: float) -> None:
        for _ in range(int(looks * 10)):
            self.dog.quiet(LOOK / 10)


@pytest.fixture(scope="module")
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def ring(sleeper: subprocess.Popen[bytes]) -> Ring:
    return Ring(sleeper.pid)


def test_nobody_is_asked_before_it_is_silent_for_long(ring: Ring) -> None:
    for _ in range(100):
        ring.wait(0.9)
        ring.dog.heard()
    assert ring.serial == 0


def test_a_slow_disk_is_waited_for_and_told_once(ring: Ring) -> None:
    ring.reading |= {"in_flight": 7.0, "backlog": 3.0}
    ring.wait(50)
    assert len(ring.said) == 1
    assert "10 reads are waited for; all workers are alive" in ring.said[0]


def test_a_disk_that_answers_is_not_slow(ring: Ring) -> None:
    ring.reading["in_flight"] = 7.0
    for _ in range(50):
        ring.reading = ring.reading | {"wakes": ring.reading["wakes"] + 1}
        ring.wait(1)
    assert ring.said == []


def test_who_does_not_answer_hangs(ring: Ring) -> None:
    ring.silent.add("cache")
    ring.wait(HUNG_LOOKS)
    with pytest.raises(RingError, match=r"the cache worker \(pid \d+\) hangs, while it should answer for"):
        ring.wait(1.5)


def test_who_answers_again_has_not_hung(ring: Ring) -> None:
    for _ in range(5):
        ring.silent.add("predictor")
        ring.wait(1.5)
        ring.silent.clear()
        ring.dog.heard()
    ring.wait(2)


def test_who_is_stopped_is_called_so(ring: Ring, sleeper: subprocess.Popen[bytes]) -> None:
    ring.silent.update(WORKERS)
    os.kill(sleeper.pid, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(RingError, match=r"the predictor worker \(pid \d+\) is stopped \(SIGSTOP\)"):
            ring.wait(10)
    finally:
        os.kill(sleeper.pid, signal.SIGCONT)


def test_a_ring_in_which_nobody_works_stands_still(ring: Ring) -> None:
    ring.wait(STILL_LOOKS + 1)
    with pytest.raises(RingError, match="stands still for 80 s: all workers answer, none of them works"):
        ring.wait(2)


def test_a_ring_that_computes_does_not_stand_still(ring: Ring) -> None:
    spent = iter(range(0, 100_000, 5))
    ring.dog._processors = lambda: float(next(spent))  # type: ignore[method-assign]
    ring.wait(50)
    assert ring.said == []
