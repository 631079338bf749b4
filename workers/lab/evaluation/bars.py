"""Progress of an evaluation on standard error: a bar for every stage."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TaskID


class Bars:
    """Use as a context manager; the bars are gone afterwards."""

    def __init__(self) -> None:
        self._bars = Progress(console=Console(stderr=True), transient=True)
        self._stages: dict[str, TaskID] = {}

    def tell(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._stages[stage], completed=done)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
