"""The two staging halves: granted in turn to groups of all layers, in the order of their sets."""

from __future__ import annotations

from collections import deque

from pipeline.ring.messages import PartDone, ReadBundles

HALVES = 2


class Staging:
    """Which groups of parts read into a half, and which wait for one."""

    def __init__(self) -> None:
        self._groups = 0  # enrolled since the start
        self._granted: deque[ReadBundles] = deque()
        self._waiting: deque[ReadBundles] = deque()

    def next_half(self, ahead: int) -> int:
        """The half of the group that is enrolled after `ahead` others."""
        return (self._groups + ahead) % HALVES

    def enrol(self, groups: list[ReadBundles]) -> list[ReadBundles]:
        """Queue a set's groups; returns those that may be read now."""
        self._groups += len(groups)
        self._waiting.extend(groups)
        return self._grant()

    def done(self, message: PartDone) -> list[ReadBundles]:
        """A half is free again; returns what may be read into it now."""
        assert self._granted, "a part is done that has no staging half"
        oldest = self._granted.popleft()
        ended, expected = (
            (message.step, message.layer, message.part),
            (oldest.step.number, oldest.layer, oldest.part),
        )
        assert ended == expected, f"part {ended} is done before part {expected}"
        return self._grant()

    @property
    def idle(self) -> bool:
        return not self._granted and not self._waiting

    def _grant(self) -> list[ReadBundles]:
        granted = []
        while self._waiting and len(self._granted) < HALVES:
            self._granted.append(self._waiting.popleft())
            granted.append(self._granted[-1])
        return granted
