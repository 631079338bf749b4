"""What a search tries, as it goes: a line for each value, and what is running now."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.text import Text

from pipeline.console import say
from pipeline.status import Status, duration, telling
from pipeline.tuning.document import line_of
from pipeline.tuning.knobs import Settings, Value
from pipeline.tuning.search import Tried


class Show:
    """Use as a context manager."""

    def __init__(self, beginning: Mapping[str, Value], deadline: float) -> None:
        """`deadline`: of the search, as `time.monotonic` counts."""
        self._beginning, self._deadline = dict(beginning), deadline
        self._trials, self._what = 0, ""
        self._console = Console(file=sys.stderr)
        self._status = Status()
        self._stack = ExitStack()

    def now(self, settings: Settings) -> None:
        """A trial of these settings begins."""
        differing = [f"{key} = {value}" for key, value in settings.items() if value != self._beginning[key]]
        self._trials, self._what = self._trials + 1, ", ".join(differing) or "the beginning"

    def tried(self, one: Tried) -> None:
        """A value has been compared."""
        if not self._status.terminal:
            say(line_of(one))
            return
        self._status.clear()
        self._console.print(Text(line_of(one), "green" if one.taken else "dim" if one.refused else ""))

    def text(self) -> str:
        """`trial 4: compute.threads = 1; 1 min 20 s left`."""
        left = duration(max(0.0, self._deadline - time.monotonic()))
        return f"trial {self._trials}: {self._what}; {left} left"

    def __enter__(self) -> Show:
        self._stack.enter_context(telling(self.text, self._status))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
