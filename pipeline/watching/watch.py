"""`--watch`: the ring at work on standard error, while text goes to standard output.

On a terminal the figures are drawn over themselves. Where the text goes to the same terminal, its end is
shown above them, and all of it is written when the answer is whole. Without a terminal a line comes every few
seconds.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pipeline.console import is_quiet, say, write
from pipeline.ring.session import Session
from pipeline.status import LINE_SECONDS, Clock, Pace
from pipeline.watching.figures import Figures, Look, figures

if TYPE_CHECKING:
    from rich.live import Live

FRAME_SECONDS = 0.5


class Watch:
    """`Session.look` with --watch. `piece` takes the text, `end` its end."""

    def __init__(self, session: Session, ceiling: float, clock: Clock = time.monotonic) -> None:
        """`ceiling`: bytes a second that the disk delivers; 0: not known."""
        self._session, self._ceiling, self._clock = session, ceiling, clock
        self._drawn = sys.stderr.isatty() and not is_quiet()
        self._held = self._drawn and sys.stdout.isatty()  # the text waits for the answer's end
        every = FRAME_SECONDS if self._drawn else LINE_SECONDS
        self._pace = Pace(every, every, clock)
        self._text = ""
        self._before: Look | None = None
        self._began = 0.0
        self._live: Live | None = None
        session.live_seconds = FRAME_SECONDS

    def __call__(self) -> None:
        generation = self._session.last
        assert generation is not None
        if self._before is None:
            self._began = self._clock()
            self._before = Look(self._began, generation.before, 0)
        if not self._pace.due():
            return
        found = self._look(generation.before, len(generation.tokens))
        if self._drawn:
            self._draw(found)
        else:
            from pipeline.watching.display import line

            say(line(found))

    def _look(self, start: dict[str, dict[str, float]], tokens: int) -> Figures:
        session = self._session
        assert self._before is not None
        now = Look(self._clock(), dict(session.live), tokens)
        found = figures(
            self._before,
            now,
            start,
            layers=session.plan.layers,
            began=self._began,
            ceiling=self._ceiling,
            memory=session.ring.memory.bytes,
            budget=session.budget,
        )
        self._before = now
        return found

    def _draw(self, found: Figures) -> None:
        from rich.console import Console
        from rich.live import Live

        from pipeline.watching.display import rendered

        if self._live is None:
            console = Console(file=sys.stderr)
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        width = self._live.console.width
        self._live.update(rendered(found, self._text if self._held else "", width), refresh=True)

    def piece(self, text: str) -> None:
        """More of the answer."""
        if self._held:
            self._text += text
        else:
            write(text)

    def end(self) -> None:
        """The answer is over: the figures go, and a held text is written."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        text, self._text, self._before = self._text, "", None
        if text:
            write(text)
