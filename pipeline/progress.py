"""Progress bars for what takes long: conversion and verification. Apart from the console's one-line
words because rich takes longer to import than most commands take to run."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """A progress bar over bytes, on a terminal; silent where standard error is none.

    It is called with a stage's name, the bytes done so far and the bytes in total; each stage has a
    bar of its own.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(f"{self._what}: {stage}", total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
