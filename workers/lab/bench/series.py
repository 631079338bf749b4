"""A row's runs, one at a time: rows take turns, since a shared machine changes within minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from workers.lab.bench.children import ChildFailed, Ran
from workers.lab.bench.rows import Row


@dataclass(slots=True)
class Series:
    """What is run again and again, and the row that its runs make."""

    name: str
    run: Callable[[], Ran]  # raises ChildFailed
    row: Callable[[Sequence[Ran]], Row]
    techniques: tuple[str, ...] = ()
    budget_bytes: int | None = None
    streams: bool = False  # reads most of the model for every token, sequentially
    runs: list[Ran] = field(default_factory=list)
    error: str = ""

    def again(self) -> Row:
        """Run once more; the row of all runs so far. What has failed once is not tried again."""
        if not self.error:
            try:
                self.runs.append(self.run())
            except ChildFailed as error:
                self.error = str(error)
        if not self.runs:
            return Row(self.name, self.techniques, self.error, budget_bytes=self.budget_bytes)
        return replace(self.row(self.runs), failed=self.error)
