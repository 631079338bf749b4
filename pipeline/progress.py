"""Progress of what takes long and can be counted: bars on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from pipeline.console import is_quiet, size
from pipeline.status import Clock, Status, duration, remaining, telling

BYTES = "bytes"


class Shown(Protocol):
    """Where progress is shown."""

    def tell(self, stage: str, done: int, total: int) -> None: ...

    def running(self) -> AbstractContextManager[object]: ...


class Progress:
    """Progress of several stages. Use as a context manager.

    It is called with a stage's name, what is done so far and what there is to do in all; each stage has a bar
    of its own. `unit` names what is counted.
    """

    def __init__(self, what: str, unit: str = BYTES) -> None:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        shown: Shown = _OnTerminal(what, unit) if on_terminal else Lines(what, unit)
        self._shown = shown
        self._stack = ExitStack()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._shown.tell(stage, done, total)

    def counting(self, stage: str) -> _Counting:
        """For callees that count one stage only."""
        return _Counting(self, stage)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._shown.running())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Counting:
    """One stage of a progress: called with what is done, and what there is to do."""

    def __init__(self, progress: Progress, stage: str) -> None:
        self._progress, self._stage = progress, stage

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._stage, done, total)


class Lines:
    """Of no terminal. The line of the present stage; `tell` and `text` are for different threads."""

    def __init__(self, what: str, unit: str, clock: Clock = time.monotonic) -> None:
        self._what, self._unit, self._clock = what, unit, clock
        self._lock = threading.Lock()
        self._stage, self._done, self._total = "", 0, 0
        self._began, self._from = clock(), 0

    def tell(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            if stage != self._stage:
                self._stage, self._began, self._from = stage, self._clock(), done
            self._done, self._total = done, total

    def text(self) -> str:
        """`converting x: bundles 45 %, 12 s left (1.20 GiB of 2.60 GiB, 210.00 MiB/s)`."""
        with self._lock:
            stage, done, total, before = self._stage, self._done, self._total, self._from
            seconds = self._clock() - self._began
        if not total:
            return f"{self._what}: {f'{stage}, ' if stage else ''}{duration(seconds)} so far"
        # What an interrupted work had done already tells nothing of its speed.
        grown, share = done - before, remaining(done, total, 0)
        left = seconds * (total - done) / grown if grown > 0 else 0.0
        ahead = f", {duration(left)} left" if grown > 0 else ""
        amounts = f"{done:,} of {total:,} {self._unit}"
        if self._unit == BYTES:
            rate = grown / seconds if seconds > 0 else 0.0
            amounts = f"{size(done)} of {size(total)}, {size(rate)}/s"
        return f"{self._what}: {stage} {share}{ahead} ({amounts})"

    def running(self) -> AbstractContextManager[None]:
        return telling(self.text, Status(self._clock, terminal=False))


class _OnTerminal:
    """Rich's bars, gone at the end. Until the first stage is told, one runs to and fro."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._tasks: dict[str, TaskID] = {}
        amounts: tuple[ProgressColumn, ...] = (
            (DownloadColumn(binary_units=True), TransferSpeedColumn())
            if unit == BYTES
            else (MofNCompleteColumn(), TextColumn(unit))
        )
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            *amounts,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=is_quiet(),
        )
        self._first: TaskID | None = self._bars.add_task(what, total=None)

    def tell(self, stage: str, done: int, total: int) -> None:
        if self._first is not None:
            self._bars.remove_task(self._first)
            self._first = None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(f"{self._what}: {stage}", total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def running(self) -> AbstractContextManager[object]:
        return self._bars
