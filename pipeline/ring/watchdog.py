"""What to think of a ring that says nothing: a slow disk is waited for, a dead worker is not.

After `LOOK_SECONDS` of silence every worker is asked for its counters. They answer between messages, whatever
the disk does, so one that does not is hung. Where all answer, reads in flight mean a slow disk, and processor
time means work; a ring with neither has lost a message and would wait for ever.

Silence is counted while this process runs, so that a whole program that was stopped (Ctrl-Z, a debugger) and
goes on does not take its workers for hung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import psutil

from pipeline.ring.messages import Stats
from storage.errors import RingError

LOOK_SECONDS = 10.0  # of silence before the workers are asked, and between one look and the next
HUNG_LOOKS, STILL_LOOKS = 3, 6  # looks without an answer, or without any work, until that is an error
IDLE_SHARE = 0.03  # of a core: what waiting takes, all workers together


class Watchdog:
    """Looks at one ring while somebody waits for it."""

    def __init__(
        self,
        pids: Mapping[str, int],
        ask: Callable[[], int],
        say: Callable[[str], None],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """`pids`: worker → process. `ask` asks all for their `Stats`, and gives the serial of the answers."""
        self._pids, self._ask, self._say = pids, ask, say
        self.look_seconds = look_seconds
        self._told = False
        self.heard()

    def heard(self) -> None:
        """The ring said something, other than counters."""
        self.silent = 0.0  # seconds
        self._next = self.look_seconds
        self._serial = 0
        self._unanswered = self._still = 0  # looks
        self._answers: dict[str, Stats] = {}
        self._before: tuple[float, float] | None = None  # completions, and seconds of processors
        self._told = False

    def counted(self, stats: Stats) -> None:
        """A worker told its counters."""
        self._answers[stats.name] = stats

    def quiet(self, seconds: float) -> None:
        """Nothing came for so long. Raises RingError where a worker hangs, or the ring stands still."""
        self.silent += seconds
        if self.silent < self._next or not self._pids:
            return
        self._next += self.look_seconds
        if self._serial:
            self._judge()
        self._serial = self._ask()

    def _judge(self) -> None:
        late = [name for name in self._pids if not self._has_answered(name)]
        if late:
            self._unanswered += 1
            if self._unanswered >= HUNG_LOOKS:
                raise RingError(f"{self._hung(late[0])}, while it should answer for {self.silent:.0f} s")
            return
        self._unanswered = 0
        reader = self._answers["prefetcher"].values
        waiting = reader.get("in_flight", 0.0) + reader.get("backlog", 0.0)
        now = (reader.get("wakes", 0.0), self._processors())
        before, self._before = self._before, now
        if before is None or now[0] != before[0]:
            self._still = 0
            return
        if waiting:
            self._still = 0
            self._tell_slow(waiting)
        elif now[1] - before[1] > IDLE_SHARE * self.look_seconds:
            self._still = 0
        else:
            self._still += 1
            if self._still >= STILL_LOOKS:
                raise RingError(
                    f"the ring stands still for {self.silent:.0f} s: all workers answer, none of them works, "
                    "and nothing is being read"
                )

    def _has_answered(self, name: str) -> bool:
        answer = self._answers.get(name)
        return answer is not None and answer.serial >= self._serial

    def _hung(self, name: str) -> str:
        pid = self._pids[name]
        try:
            stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            stopped = False
        how = "is stopped (SIGSTOP)" if stopped else "hangs"
        return f"the {name} worker (pid {pid}) {how}"

    def _processors(self) -> float:
        """Seconds that all workers have computed."""
        total = 0.0
        for pid in self._pids.values():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:  # its death is somebody else's to tell
                continue
            total += times.user + times.system
        return total

    def _tell_slow(self, waiting: float) -> None:
        if not self._told:
            self._told = True
            self._say(
                f"the disk has answered nothing for {self.look_seconds:.0f} s and more, {waiting:.0f} reads "
                "are waited for; all workers are alive"
            )
