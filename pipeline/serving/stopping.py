"""Stop strings: ends a text before the first of them, also when it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through, but holds back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False
        self.rest = ""  # what came after the stop string, until it was found

    def push(self, text: str) -> str:
        """The text that may be shown now. After `found` nothing more is."""
        if self.found:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            at, stop = min(ends)
            shown, self.rest, self._held = self._held[:at], self._held[at + len(stop) :], ""
            return shown
        keep = max(self._beginning(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _beginning(self, stop: str) -> int:
        """Length of the longest ending of the held text with which `stop` begins."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> str:
        """What is still held back: no stop string came of it."""
        rest, self._held = self._held, ""
        return "" if self.found else rest
