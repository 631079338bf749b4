"""What a search tries, as it goes: a line for each value, and on a terminal what is running now."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.status import Status
from rich.text import Text

from pipeline.console import say
from pipeline.tuning.document import line_of
from pipeline.tuning.knobs import Settings, Value
from pipeline.tuning.search import Tried


class Show:
    """Use as a context manager."""

    def __init__(self, beginning: Mapping[str, Value], deadline: float) -> None:
        """`deadline`: of the search, as `time.monotonic` counts."""
        self._beginning, self._deadline = dict(beginning), deadline
        self._trials = 0
        self._console = Console(file=sys.stderr)
        self._status: Status | None = None

    def now(self, settings: Settings) -> None:
        """A trial of these settings begins."""
        self._trials += 1
        if self._status is None:
            return
        differing = [f"{key} = {value}" for key, value in settings.items() if value != self._beginning[key]]
        left = max(0, round(self._deadline - time.monotonic()))
        what = ", ".join(differing) or "the beginning"
        self._status.update(f"trial {self._trials}: {what}; {left // 60}:{left % 60:02} left")

    def tried(self, one: Tried) -> None:
        """A value has been compared."""
        if self._status is None:
            say(line_of(one))
        else:
            self._console.print(Text(line_of(one), "green" if one.taken else "dim" if one.refused else ""))

    def __enter__(self) -> Show:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
