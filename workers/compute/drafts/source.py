"""Where drafts come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.ring.sampling import Sampling


class Source(Protocol):
    """Drafts behind one text, which grows. Calls of one run begin with `begin`."""

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """A run begins, whose tokens are chosen so."""

    def trust(self, text: Sequence[int]) -> int:
        """What the drafts behind `text`, prompt and answer so far, are worth: 0 for none, more is better.

        There are no more drafts than that. Of each number it is counted how often its drafts come true.
        """

    def draft(self, text: Sequence[int], count: int, index: int) -> list[int]:
        """So many tokens behind the same `text`; the first would be the answer's token `index`."""

    def close(self) -> None:
        """Give threads and memory back."""
