"""A line while a generation says nothing: how far its prompt is, or what a slow token waits for."""

from __future__ import annotations

from typing import Protocol

from pipeline.console import write
from pipeline.ring.counters import NOW_LAYER, NOW_WAITS
from pipeline.ring.generation import Generation
from pipeline.ring.session import Session
from pipeline.status import Status, duration, remaining


class Viewer(Protocol):
    """What looks at a session's generations, and lets their text through."""

    def __call__(self) -> None:
        """As `Session.look`."""

    def piece(self, text: str) -> None: ...

    def end(self) -> None:
        """The answer is over."""


class Plain:
    """Looks at nothing."""

    def __call__(self) -> None: ...

    def piece(self, text: str) -> None:
        write(text)

    def end(self) -> None: ...


class Waits:
    """`Session.look` of the commands that write text: `piece` takes it, `end` comes behind it."""

    def __init__(self, session: Session, status: Status | None = None) -> None:
        self._session = session
        self._status = status or Status()
        self._of: Generation | None = None

    def __call__(self) -> None:
        if self._session.last is not self._of:
            self._of = self._session.last
            self._status.clear()
        self._status.tell(self._text)

    def piece(self, text: str) -> None:
        """More of the answer, for which the line makes room."""
        self._status.clear()
        write(text)

    def end(self) -> None:
        self._status.clear()

    def _text(self) -> str:
        session = self._session
        generation = session.last
        assert generation is not None
        seconds, layers = session.silent_seconds, session.plan.layers
        compute = session.live.get("compute", {})
        if not generation.tokens:
            tokens = len(generation.prompt) - generation.cached
            return f"[prompt of {tokens:,} tokens: {remaining(session.prompt_done, 1.0, seconds)}]"
        what = "waits for" if compute.get(NOW_WAITS) else "computes"
        layer = int(compute.get(NOW_LAYER, 0.0))
        return f"[the next token: {duration(seconds)} so far, {what} layer {layer + 1} of {layers}]"
