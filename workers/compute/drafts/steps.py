"""A run's decode steps: a token in, the logits behind it out.

A step computes its token and, behind it, drafts. While the tokens that are chosen are the drafts, their
logits are there already; the first that is another begins the next step, at its own position: keys and values
of drafts that did not come true are overwritten before anything reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from pipeline.ring.counters import ACCEPTED, DRAFTED, STEPS
from storage.codecs import F32
from workers.compute.drafts.source import Source
from workers.compute.drafts.worth import Worth


class Steps:
    """Of one run. `end` must follow the last token, also where the run ends early."""

    def __init__(
        self,
        text: Sequence[int],
        forward: Callable[[Sequence[int], int], Any],
        logits: Callable[[Any], F32],
        counts: MutableMapping[str, float],
        source: Source | None,
        worth: Worth,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`text`: the prompt. `forward(tokens, position)` runs a step whose first token has that position.

        It returns the hidden rows [tokens, d_model], of which `logits` makes one row's [vocabulary].
        `counts` grow by steps, drafts and those accepted. Without a source every step has one token.
        """
        self._text = list(text)
        self._prompt = len(self._text)
        self._forward, self._logits, self._counts = forward, logits, counts
        self._source, self._worth, self._clock = source, worth, clock
        self._drafts: list[int] = []  # of the step at hand
        self._accepted = 0
        self._trust = 0
        self._rows: Any = None
        self._seconds = 0.0  # that the step at hand has taken

    def after(self, token: int, room: int) -> F32:
        """Logits [vocabulary] behind one more token.

        `room`: for how many further tokens the logits may be wanted, and there is context.
        """
        self._text.append(token)
        expected = self._drafts[self._accepted] if self._accepted < len(self._drafts) else None
        if token == expected:
            self._accepted += 1
        else:
            self.end()
            started = self._clock()
            self._begin(token, room)
            self._seconds = self._clock() - started
        started = self._clock()
        logits = self._logits(self._rows[self._accepted : self._accepted + 1])
        self._seconds += self._clock() - started
        return logits

    def end(self) -> None:
        """The step at hand, if there is one, has brought all that it will."""
        if self._rows is None:
            return
        self._counts[ACCEPTED] += self._accepted
        self._worth.took(self._trust, len(self._drafts), self._accepted, self._seconds)
        self._rows = None
        self._drafts, self._accepted = [], 0

    def _begin(self, token: int, room: int) -> None:
        self._trust = 0
        if self._source is not None:
            self._trust = self._source.trust(self._text)
            count = self._worth.count(self._trust, room)
            if count:
                self._drafts = self._source.draft(self._text, count, len(self._text) - self._prompt)
        self._counts[STEPS] += 1
        self._counts[DRAFTED] += len(self._drafts)
        self._rows = self._forward([token, *self._drafts], len(self._text) - 1)
