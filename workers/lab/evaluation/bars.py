"""Progress of an evaluation on standard error: a bar, or lines, for every stage."""

from __future__ import annotations

from pipeline.progress import Progress


class Bars(Progress):
    """Use as a context manager; the bars are gone afterwards."""

    def __init__(self) -> None:
        super().__init__("evaluating", "done")

    def tell(self, stage: str, done: int, total: int) -> None:
        self(stage, done, total)
