"""No wait is silent: what long work says, by a clock that the test holds."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from pipeline import console, status
from pipeline.progress import Lines
from pipeline.status import LINE_SECONDS, Pace, Status, duration, remaining

LONGEST = 5.0  # seconds that a person may hear nothing


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """Standard error that is, or is no, terminal; notes when each line came."""

    def __init__(self, clock: FakeClock, terminal: bool) -> None:
        super().__init__()
        self.moments: list[float] = []
        self._clock, self._terminal = clock, terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.moments.append(self._clock())
        return super().write(text)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def listen(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, terminal: bool) -> Stream:
    monkeypatch.delenv(console.QUIET, raising=False)
    stream = Stream(clock, terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def silences(stream: Stream, start: float, end: float) -> list[float]:
    times = [start, *stream.moments, end]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize("terminal", [False, True])
def test_work_that_reports_nothing_is_never_silent_for_long(monkeypatch, clock, terminal):
    stream = listen(monkeypatch, clock, terminal)
    shown, start = Status(clock, terminal), clock()
    for _ in range(1000):  # a hundred seconds, as the thread of `telling` ticks
        clock.now += status.TICK_SECONDS
        shown.tell(lambda: "still at it")
    assert max(silences(stream, start, clock())) <= LONGEST
    if not terminal:
        assert min(silences(stream, start, stream.moments[-1])[:-1]) > LINE_SECONDS - 1e-6  # and no more


def test_of_work_within_work_the_inner_one_tells(monkeypatch, clock):
    monkeypatch.setattr(status, "TICK_SECONDS", 0.001)
    said: list[str] = []
    heard = threading.Event()

    def tell(text: str) -> str:
        said.append(text)
        heard.set()
        return text

    def wait() -> None:
        heard.clear()
        assert heard.wait(10)

    listen(monkeypatch, clock, terminal=True)
    monkeypatch.setattr(status, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(status, "TERMINAL_SECONDS", 0.0)
    with status.telling(lambda: tell("outer"), Status(terminal=True)):
        wait()
        with status.telling(lambda: tell("inner"), Status(terminal=True)):
            said.clear()
            wait()
            wait()
            assert set(said[1:]) == {"inner"}, "the outer one may have been about to tell"
        said.clear()
        wait()
        assert said[-1] == "outer"


def test_short_work_says_nothing_in_a_pipe(monkeypatch, clock):
    stream = listen(monkeypatch, clock, terminal=False)
    shown = Status(clock, terminal=False)
    for _ in range(29):
        clock.now += 0.1
        shown.tell(lambda: "still at it")
    shown.clear()
    assert stream.getvalue() == ""


def test_a_sign_of_life_puts_the_next_line_off(clock):
    pace = Pace(3.0, 3.0, clock)
    clock.now += 2.9
    pace.restart()
    clock.now += 2.9
    assert not pace.due()
    clock.now += 0.2
    assert pace.due()
    assert not pace.due()


def test_a_terminals_line_stays_behind_the_cursor_and_goes(monkeypatch, clock):
    stream = listen(monkeypatch, clock, terminal=True)
    shown = Status(clock, terminal=True)
    clock.now += 2
    shown.tell(lambda: "half")
    shown.clear()
    assert stream.getvalue() == "\x1b[K\x1b7\x1b[?7lhalf\x1b[?7h\x1b8\x1b[K"


def test_quiet_silences_progress_and_words_but_no_errors(monkeypatch, clock):
    stream = listen(monkeypatch, clock, terminal=False)
    monkeypatch.setenv(console.QUIET, "1")
    shown = Status(clock, terminal=False)
    clock.now += 100
    shown.tell(lambda: "still at it")
    console.say("a word")
    assert stream.getvalue() == ""
    console.always_say("an error")
    assert stream.getvalue() == "an error\n"


def steps(lines: Lines, clock: FakeClock, stage: str, *done: int, total: int) -> None:
    for one in done:
        lines.tell(stage, one, total)
        clock.now += 2


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("layers", "training x: maps 50 %, 4 s left (4 of 8 layers)"),
        ("bytes", "training x: maps 50 %, 4 s left (4 B of 8 B, 1 B/s)"),
    ],
)
def test_a_line_tells_how_far_and_how_long(clock, unit, text):
    lines = Lines("training x", unit, clock)
    steps(lines, clock, "maps", 0, 2, 4, total=8)
    clock.now -= 2
    assert lines.text() == text


def test_what_was_done_before_tells_nothing_of_the_speed(clock):
    lines = Lines("converting x", "layers", clock)
    steps(lines, clock, "resume", 80, 90, total=100)  # of an interrupted work
    assert lines.text() == "converting x: resume 90 %, 4 s left (90 of 100 layers)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (-1, "0 s")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_what_remains_is_extrapolated():
    assert remaining(0, 8, 10) == "0 %"
    assert remaining(2, 8, 10) == "25 %, 30 s left"
    assert remaining(9, 8, 10) == "100 %, 0 s left"
    assert remaining(1, 0, 10) == "0 %"


def test_telling_ends_with_its_work(monkeypatch):
    shown: list[Callable[[], str]] = []
    silent = Status()
    monkeypatch.setattr(silent, "tell", shown.append)
    with status.telling(lambda: "x", silent):
        while not shown:
            assert threading.active_count() > 1
    assert [thread.name for thread in threading.enumerate() if thread.name == "status"] == []
