"""What long work says while nothing else comes: one line on standard error, so that no wait is silent.

On a terminal the line stands behind the cursor, is written over itself, and is gone at the end. Elsewhere, in
a pipe or a file, lines follow one another every few seconds, and short work says nothing. Without rich, which
takes longer to import than most commands take to run: `progress.py` has bars.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.console import ERASE, is_quiet

LINE_SECONDS = 3.0  # between two lines where standard error is no terminal
PATIENCE_SECONDS = 1.0  # of a terminal before the first one
TERMINAL_SECONDS = 0.2  # and between two
TICK_SECONDS = 0.1
# The cursor stays where it is, which may be within a text, and what does not fit into its line is cut.
SHOW = "\x1b7\x1b[?7l{}\x1b[?7h\x1b8"

Clock = Callable[[], float]

# Who is `telling` now, outermost first. There is one terminal, and the innermost knows most.
_TELLING: list[object] = []


class Pace:
    """When the next line is due: `first` seconds after the last sign of life, then every `every` seconds."""

    def __init__(self, first: float, every: float, clock: Clock = time.monotonic) -> None:
        self._first, self._every, self._clock = first, every, clock
        self.restart()

    def restart(self) -> None:
        """Something else was said just now."""
        self._due = self._clock() + self._first

    def due(self) -> bool:
        """Whether to say something; then it counts as said."""
        now = self._clock()
        if now < self._due:
            return False
        self._due = now + self._every
        return True


class Status:
    """A line that tells how far the work is. `tell` may be called as often as one likes, by one thread."""

    def __init__(self, clock: Clock = time.monotonic, terminal: bool | None = None) -> None:
        self.terminal = _is_terminal() if terminal is None else terminal
        first = PATIENCE_SECONDS if self.terminal else LINE_SECONDS
        self._pace = Pace(first, TERMINAL_SECONDS if self.terminal else LINE_SECONDS, clock)
        self._shown = False

    def tell(self, text: Callable[[], str]) -> None:
        """Show the text where a line is due; it is made only then."""
        if is_quiet() or not self._pace.due():
            return
        if not self.terminal:
            _put(text() + "\n")
            return
        _put(ERASE + SHOW.format(text()))
        self._shown = True

    def clear(self) -> None:
        """Something else comes now: the terminal's line goes, and the wait begins anew."""
        if self._shown:
            _put(ERASE)
            self._shown = False
        self._pace.restart()


@contextmanager
def telling(text: Callable[[], str], status: Status | None = None) -> Iterator[None]:
    """Tell the text while work that does not come back is done, from a thread of its own.

    It waits while other work within this work tells a text.
    """
    shown = status or Status()
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK_SECONDS):
            if _TELLING[-1:] == [shown]:
                shown.tell(text)

    thread = threading.Thread(target=tick, name="status", daemon=True)
    _TELLING.append(shown)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _TELLING.remove(shown)
        shown.clear()


def waiting(what: str) -> contextlib.AbstractContextManager[None]:
    """`telling` for work of which only the time is known that it takes."""
    started = time.monotonic()
    return telling(lambda: f"{what}: {duration(time.monotonic() - started)} so far")


def duration(seconds: float) -> str:
    """For people: `3 s`, `2 min 5 s`, `1 h 4 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def remaining(done: float, total: float, seconds: float) -> str:
    """How far, and how long it will still take, if it goes on as it did for `seconds`: `45 %, 12 s left`."""
    share = min(1.0, done / total) if total > 0 else 0.0
    left = f", {duration(seconds * (1 - share) / share)} left" if share > 0 and seconds > 0 else ""
    return f"{100 * share:.0f} %{left}"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _put(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
