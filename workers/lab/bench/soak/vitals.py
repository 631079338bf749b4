"""What a server and its workers hold, over time: memory, descriptors, threads, shared memory, files."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from workers.lab.bench.soak.running import Running
from workers.lab.pictures import picture

MIB = 1 << 20
SETTLED = 15.0  # seconds that a ring takes to load, at most


@dataclass(frozen=True, slots=True)
class Vitals:
    """At one moment."""

    minute: float
    server_mib: float  # resident memory of its own: without what it shares
    workers_mib: float  # the same of the workers, all together
    descriptors: int  # of all processes
    threads: int
    processes: int
    shared_mib: float  # of memory without a name (memfd), as far as it has pages
    named: int  # names in /dev/shm that were not there before
    files: int  # files and directories in the server's temporary directory


FLAT = {  # what must not grow: unit, and what the second half may have above the first, at most
    "server_mib": ("MiB", 24.0),
    "workers_mib": ("MiB", 24.0),
    "descriptors": ("", 4.0),
    "threads": ("", 2.0),
    "shared_mib": ("MiB", 1.0),
    "named": ("", 0.0),
    "files": ("", 1.0),
}


class Clock:
    """Seconds that a run has run. Whoever stops all of its processes for minutes stops this, too."""

    LONGEST = 2.0  # seconds between two ticks that are believed

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Called once in a while, by one thread; returns the seconds so far."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self.LONGEST)
        self._last = now
        return self.seconds


class Recorder:
    """Takes vitals every few seconds, in a thread of its own."""

    def __init__(self, server: Running, directory: Path, seconds: float, clock: Clock) -> None:
        self._server, self._directory, self._seconds = server, directory, seconds
        self._before = set(_shared())
        self._clock = clock
        self._ended = threading.Event()
        self.taken: list[Vitals] = []
        self._thread = threading.Thread(target=self._run, name="vitals")
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            workers = self._server.workers()
            with contextlib.suppress(psutil.Error):
                # Between a death and the next ring, and while that loads, there is nothing to compare.
                ages = [time.time() - one.create_time() for one in workers.values()]
                if len(ages) == 4 and min(ages) > SETTLED:
                    self.taken.append(self._take(list(workers.values())))

    def _take(self, workers: Sequence[psutil.Process]) -> Vitals:
        server = psutil.Process(self._server.process.pid)
        every = [server, *workers]
        return Vitals(
            minute=round(self._clock.seconds / 60, 3),
            server_mib=round(server.memory_full_info().uss / MIB, 2),
            workers_mib=round(sum(one.memory_full_info().uss for one in workers) / MIB, 2),
            descriptors=sum(one.num_fds() for one in every),
            threads=sum(one.num_threads() for one in every),
            processes=1 + len(server.children(recursive=True)),
            shared_mib=round(_memfds(server, workers) / MIB, 2),
            named=len(set(_shared()) - self._before),
            files=sum(1 for _ in self._directory.rglob("*")),
        )

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def _shared() -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir("/dev/shm")
    return []


def _memfds(server: psutil.Process, workers: Sequence[psutil.Process]) -> int:
    """Bytes of nameless shared memory that these processes hold open, each once."""
    found: dict[int, int] = {}
    for process in (server, *workers):
        directory = Path(f"/proc/{process.pid}/fd")
        with contextlib.suppress(OSError):
            for entry in directory.iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry).startswith("/memfd:"):
                        status = entry.stat()
                        found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def growth(taken: Sequence[Vitals]) -> dict[str, float]:
    """By how much the median of the last third exceeds that of the middle third."""
    third = len(taken) // 3
    middle, last = taken[third : 2 * third], taken[2 * third :]
    return {
        name: round(
            statistics.median(getattr(one, name) for one in last)
            - statistics.median(getattr(one, name) for one in middle),
            2,
        )
        for name in FLAT
    }


def not_flat(found: dict[str, float]) -> list[str]:
    """What grew by more than it may, in words."""
    return [
        f"{name} grew by {found[name]:g} {unit}" for name, (unit, most) in FLAT.items() if found[name] > most
    ]


def draw(path: Path, taken: Sequence[Vitals], deaths: Sequence[float]) -> None:
    """A picture of everything over time; lines where workers were killed, in minutes."""
    minutes = [one.minute for one in taken]
    with picture(path, len(FLAT), size=(8, 9), sharex=True) as panels:
        for (panel,), (name, (unit, _)) in zip(panels, FLAT.items(), strict=True):
            panel.plot(minutes, [asdict(one)[name] for one in taken], linewidth=1)
            for death in deaths:
                panel.axvline(death, color="tab:red", linewidth=0.5)
            panel.set_ylim(bottom=0)
            label = name.removesuffix("_mib").replace("_", " ")
            panel.set_ylabel(f"{label}\n{unit}" if unit else label, fontsize=8)
        panels[-1][0].set_xlabel("minutes; red: a worker was killed")
