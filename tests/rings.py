"""Notices the rings that tests start, in whatever process: each makes a directory of sockets in TMPDIR."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

IN_CREATE, IN_NONBLOCK, IN_CLOEXEC = 0x100, os.O_NONBLOCK, os.O_CLOEXEC  # of <sys/inotify.h>
LONGEST_EVENT = 16 + 256  # bytes: an inotify_event and a name
RING = re.compile(rb"flashring-\d+-")  # as pipeline/ring/supervisor.py names its directory


class Watch:
    """Counts the rings that start below one directory, also those that are gone again.

    Does not see a ring whose TMPDIR is elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        """Raises OSError where the kernel gives no watch."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(directory), IN_CREATE) < 0:
            raise OSError(ctypes.get_errno(), "inotify watches nothing", str(directory))
        self._count = 0

    def count(self) -> int:
        """Rings since the watch began."""
        while True:
            try:
                events = os.read(self._descriptor, 64 * LONGEST_EVENT)
            except BlockingIOError:
                return self._count
            self._count += len(RING.findall(events))

    def close(self) -> None:
        os.close(self._descriptor)


class Guard:
    """Tells which tests use a ring: one of their own, or a fixture's that an earlier test has started."""

    def __init__(self, directory: Path) -> None:
        self._watch = Watch(directory)
        self._told = 0  # rings of earlier tests
        self._fixtures: set[tuple[str, str]] = set()  # that hold rings: where they are defined, and names

    @contextmanager
    def fixture(self, place: str, name: str) -> Iterator[None]:
        """Around the set-up of a fixture."""
        before = self._watch.count()
        yield
        if self._watch.count() > before:
            self._fixtures.add((place, name))

    def ring_of(self, test: str, fixtures: Collection[str]) -> str:
        """What ring the test that has just run used, in words; empty: none."""
        count = self._watch.count()
        started, self._told = count - self._told, count
        for place, name in sorted(self._fixtures):
            if name in fixtures and test.startswith(place):
                return f"its fixture {name} starts a ring"
        return "it starts a ring" if started else ""

    def close(self) -> None:
        self._watch.close()
