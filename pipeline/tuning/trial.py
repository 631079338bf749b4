"""One measurement: a ring decodes forced tokens to warm its slots, and then again, which counts."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.tuning.knobs import Settings, changed
from storage.errors import UsageError
from storage.store import Store

FEWEST = 6  # tokens of a trial
# Of a model whose tokens take seconds, fewer, and once: each is the mean of a thousand reads.
SLOW, SLOW_TOKENS = 0.5, 5  # seconds a token; tokens of a trial


@dataclass(frozen=True, slots=True)
class Text:
    """What every trial decodes: the prompt's tokens, and the model's own answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    seconds: float  # of one token
    once: bool = False  # not a first time, to warm the ring: instead, the first token does not count

    def within(self, seconds: float) -> Text:
        """As many of its tokens as a trial can decode in that time, with as many to warm it.

        At least FEWEST; of a slow model as few as will do.
        """
        tokens = int(seconds / (2 * self.seconds))
        if tokens < FEWEST and self.seconds > SLOW:
            return replace(self, answer=self.answer[:SLOW_TOKENS], once=True)
        return replace(self, answer=self.answer[: max(FEWEST, tokens)])


def own_text(store: Store, config: Config, prompt: str, tokens: int, seconds: float = float("inf")) -> Text:
    """A prompt and what the model itself writes behind it, once, as far as it comes in `seconds`.

    It comes to FEWEST in any case. Raises UsageError where the context has no room for them.
    """
    report = plan(store, config)
    with Session(store, report.config, report.plan, budget=report.budget) as session:
        ids = session.encode(prompt)
        params = GenerationParams(tokens, sampling=Sampling(0.0, 0, 1.0, 0), ignore_eos=True)
        with contextlib.closing(session.pieces(ids, params)) as pieces:
            answer, started = [], time.monotonic()
            for piece in pieces:
                if piece.token is not None:
                    answer.append(piece.token)
                if len(answer) >= FEWEST and time.monotonic() - started > seconds:
                    break
        if len(answer) < FEWEST:
            raise UsageError(
                f"the context of {report.plan.context} tokens leaves {len(answer)} for a trial, "
                f"which needs {FEWEST}"
            )
        # Drafts may have written several tokens a step. What is decoded again is decoded one by one.
        each = _decode(session, ids, tuple(answer[:FEWEST]))
    return Text(tuple(ids), tuple(answer), statistics.median(each))


def seconds(store: Store, config: Config, settings: Settings, text: Text) -> float:
    """Of one token, the median of a trial's, under a configuration with these settings.

    Raises ConfigError and BudgetError for what cannot be, RingError for a ring that dies.
    """
    report = plan(store, changed(config, settings))
    with Session(store, report.config, report.plan, budget=report.budget) as session:
        if not text.once:
            _decode(session, text.prompt, text.answer)
        each = _decode(session, text.prompt, text.answer)
    return statistics.median(each[1:] if text.once else each)


def _decode(session: Session, prompt: Sequence[int], answer: tuple[int, ...]) -> list[float]:
    """Seconds of each token but the first, which the prompt's are part of."""
    params = GenerationParams(len(answer), ignore_eos=True, forced=answer)
    for _ in session.pieces(prompt, params):
        pass
    assert session.last is not None
    return [later - earlier for earlier, later in pairwise(session.last.moments)]
