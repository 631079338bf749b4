"""What --watch makes of a ring's counters, and how it looks."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from rich.console import Console
from ring import config, plan_for

from pipeline import console
from pipeline.ring.generation import Generation, GenerationParams
from pipeline.ring.session import Session
from pipeline.status import Status
from pipeline.watching import display
from pipeline.watching.figures import Figures, Look, figures
from pipeline.watching.waits import Waits
from pipeline.watching.watch import Watch
from storage.convert import convert

START = {
    "compute": {"waiting_seconds": 5.0, "prompt_layers": 8.0},
    "cache": {"decode_hits": 100.0, "layer.0.hits": 50.0},
    "prefetcher": {"decode_bytes": 1000.0},
    "predictor": {"seconds": 1.0},
}
BEFORE = Look(100.0, START, 0)
NOW = Look(
    102.0,
    {
        "compute": {
            "waiting_seconds": 6.0, "prompt_layers": 12.0, "now_layer": 1.0, "now_waits": 1.0,
            "audit_active": 200.0, "audit_found": 190.0,
        },
        "cache": {
            "decode_hits": 190.0, "decode_misses": 10.0, "decode_seconds": 0.2,
            "layer.0.hits": 110.0, "layer.0.misses": 0.0, "layer.1.hits": 30.0, "layer.1.misses": 10.0,
        },
        "prefetcher": {"decode_bytes": 3_001_000.0, "busy_seconds": 1.5, "in_flight": 12.0, "backlog": 3.0},
        "predictor": {"seconds": 1.5},
    },
    4,
)  # fmt: skip


def found(now: Look = NOW) -> Figures:
    return figures(BEFORE, now, START, layers=3, began=98.0, ceiling=3e6, memory=3 << 30, budget=4 << 30)


def test_figures_are_what_grew_between_two_looks():
    one = found()
    assert [(worker.name, worker.busy) for worker in one.workers] == [
        ("predictor", 0.25),
        ("cache", pytest.approx(0.1)),
        ("prefetcher", 0.75),
        ("compute", 0.5),
    ]
    assert one.workers[2].doing == "12 reads under way, 3 behind them"
    assert one.workers[3].doing == "waits for layer 1's neurons"
    assert one.tokens_per_second == 2
    assert one.read_rate == 1_500_000
    assert one.hit_rate == 0.9
    assert one.hits_by_layer == (1.0, 0.75, None)
    assert one.recall == 0.95
    assert one.prompt == ""


def test_a_prompt_tells_how_far_it_is():
    prompt = found(Look(102.0, {**NOW.stats, "compute": {"prompt_layers": 9.0}}, 0))
    assert prompt.prompt == "33 %, 8 s left"  # a layer of three, after four seconds


def test_a_line_has_it_all_without_a_terminal():
    said = display.line(found())
    assert said == (
        "[watch: tokens 4 so far, 2.0 a second; reads 2.86 MiB so far, 1.43 MiB/s of this disk's 2.86 MiB/s "
        "(50%); in memory 90.0% of what tokens wanted; memory 3.00 GiB at most so far, of 4.00 GiB; "
        "recall 95.00% of the active neurons were predicted; "
        "busy: predictor 25%, cache 10%, prefetcher 75%, compute 50%; hits by layer *7·]"
    )


def test_a_terminal_shows_a_line_a_worker_and_a_strip():
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(display.rendered(found(), "the text\nso far", 100))
    shown = console.export_text()
    for name in ("predictor", "cache", "prefetcher", "compute"):
        assert sum(line.startswith(name) for line in shown.splitlines()) == 1
    assert "█▇·" in shown
    assert shown.startswith("the text")


def test_of_a_long_text_the_end_is_shown():
    assert display.tail("abcdef", 2) == "ab\ncd\nef"
    assert display.tail("\n".join("abcdefghijkl"), 80) == "\n".join("efghijkl")


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def session(**changes: Any) -> Any:
    """As far as a viewer looks at one."""
    found = {
        "last": Generation(prompt=tuple(range(512)), before=START),
        "live": NOW.stats,
        "plan": SimpleNamespace(layers=3),
        "silent_seconds": 12.0,
        "prompt_done": 0.5,
        "ring": SimpleNamespace(memory=SimpleNamespace(bytes=1 << 30)),
        "budget": None,
        "live_seconds": 0.0,
    }
    return SimpleNamespace(**found | changes)


def test_a_long_prompt_tells_percent_and_remaining_time(monkeypatch):
    monkeypatch.delenv(console.QUIET, raising=False)
    stream, clock = Pipe(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    one = session()
    waits = Waits(one, Status(clock, terminal=False))
    waits()
    clock.now += 4
    waits()
    one.last.tokens.append(7)
    clock.now += 4
    waits()
    assert stream.getvalue().splitlines() == [
        "[prompt of 512 tokens: 50 %, 12 s left]",
        "[the next token: 12 s so far, waits for layer 2 of 3]",
    ]


def test_without_a_terminal_watch_says_lines_and_the_text_stays_clean(monkeypatch):
    monkeypatch.delenv(console.QUIET, raising=False)
    out, err, clock = Pipe(), Pipe(), Clock()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    watch = Watch(session(), 3e6, clock)
    watch()
    watch.piece("the ")
    clock.now += 4
    watch()
    watch.piece("text")
    watch.end()
    assert out.getvalue() == "the text"
    assert err.getvalue().startswith("[watch: tokens prompt: ")
    assert err.getvalue().count("\n") == 1


def test_on_a_terminal_the_text_is_whole_in_the_end(monkeypatch):
    monkeypatch.delenv(console.QUIET, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err, clock = Terminal(), Terminal(), Clock()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    watch = Watch(session(), 3e6, clock)
    watch()
    watch.piece("the ")
    clock.now += 4
    watch()
    watch.piece("text")
    assert out.getvalue() == ""  # it would be drawn over
    watch.end()
    assert out.getvalue() == "the text"
    assert "compute" in err.getvalue()
    assert "the " in err.getvalue()


@pytest.mark.ring
def test_a_ring_tells_how_far_its_prompt_is(tmp_path: Path):
    store = convert(write_checkpoint(tmp_path / "checkpoint", "opt", "float16"), tmp_path / "store", name="t")
    chosen = config()
    with Session(store, chosen, plan_for(store, chosen)) as one:
        looks: list[float | None] = []
        one.look = lambda: looks.append(one.view()["prompt"])
        one.live_seconds = 0.001
        for _ in one.generate([2, 17, 40], GenerationParams(4, ignore_eos=True)):
            pass
        assert one.prompt_done == 1
        assert one.view()["prompt"] is None  # it is over
        assert {look for look in looks if look is not None} <= {0, 1 / 3, 2 / 3, 1}
        assert None in looks  # while tokens came
        assert (one.view()["memory_bytes"] or 0) > 0
