"""`python -m workers.lab.bench.planned`: rows in which the machine changed are run again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.planner.survey import Subject
from workers.lab.bench import planned
from workers.lab.bench.planned import DRIFT, TRIES, Line


def run(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> tuple[Line, int]:
    """The row that is kept, and how often it ran: a token is planned to take `seconds`, one after another."""
    plans = iter(seconds)
    runs = []

    def plan(*_: object, **__: object) -> Any:
        return SimpleNamespace(pace=SimpleNamespace(total=next(plans)))

    def measure(plan: Any, *_: object) -> Line:
        runs.append(plan)
        milliseconds = 1e3 * plan.pace.total
        return Line("model", 8, 1 << 30, milliseconds, milliseconds, 100.0, 0.0, 0.0, {}, {})

    monkeypatch.setattr(planned, "_planned", plan)
    monkeypatch.setattr(planned, "measure", measure)
    one = cast(Subject, SimpleNamespace(name="model"))
    return planned._steady(one, "1GiB", (), 16, probe=True, fresh=False), len(runs)


def test_a_row_of_a_steady_machine_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line, runs = run(monkeypatch, 0.1, 0.1 * (1 + 0.9 * DRIFT))
    assert runs == 1
    assert line.planned_ms == pytest.approx(100)
    assert line.drift == pytest.approx(0.9 * DRIFT)


def test_a_row_that_the_machine_changed_in_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    line, runs = run(monkeypatch, 0.1, 0.2, 0.21)
    assert runs == 2
    assert (line.planned_ms, line.planned_after_ms) == (pytest.approx(200), pytest.approx(210))


def test_a_machine_that_never_rests_is_told_by_its_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    line, runs = run(monkeypatch, *(0.1 * 2**number for number in range(TRIES + 1)))
    assert runs == TRIES
    assert line.drift == pytest.approx(1.0)
