"""Drafts by looking them up: where the text's last tokens stood before, what followed them may follow again.

The longest such place wins, and of equals the latest. Copies, quotations, code that is edited, and text that
repeats itself are found so; it costs some microseconds a token and no memory worth the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pipeline.ring.sampling import Sampling

SHORTEST: Final = 2  # tokens that must have stood before
LONGEST: Final = 12  # tokens that are compared: a longer match is worth no more
PLACES: Final = 24  # that are compared at most, the latest first


class Lookup:
    """`source.Source` over the text alone. Trust is the number of tokens that match."""

    def __init__(self) -> None:
        self._ends: dict[
            tuple[int, ...], list[int]
        ] = {}  # of SHORTEST tokens, where what follows them stands
        self._indexed = 0  # tokens of the text whose ends are known
        self._place = 0  # in the text, of the drafts last trusted

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self._ends, self._indexed = {}, 0

    def trust(self, text: Sequence[int]) -> int:
        self._index(text)
        best = self._place = 0
        for place in reversed(self._ends.get(tuple(text[-SHORTEST:]), [])[-PLACES:]):
            same = self._matching(text, place)
            if same > best:
                best, self._place = same, place
        return best

    def draft(self, text: Sequence[int], count: int, index: int) -> list[int]:
        """What follows the place, and where that reaches the text's end, the drafts themselves."""
        found: list[int] = []
        for at in range(self._place, self._place + count):
            found.append(text[at] if at < len(text) else found[at - len(text)])
        return found

    def close(self) -> None:
        """There is nothing to give back."""

    def _index(self, text: Sequence[int]) -> None:
        """Of all tokens but the last, which nothing follows yet."""
        for end in range(max(self._indexed, SHORTEST), len(text)):
            self._ends.setdefault(tuple(text[end - SHORTEST : end]), []).append(end)
        self._indexed = max(self._indexed, len(text))

    @staticmethod
    def _matching(text: Sequence[int], place: int) -> int:
        """How many tokens before `place` are the text's last ones."""
        most = min(LONGEST, place)
        same = SHORTEST
        while same < most and text[place - 1 - same] == text[-1 - same]:
            same += 1
        return same
