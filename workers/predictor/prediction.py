"""A hidden state as predictions: ids into the shared rows, messages out."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.ring.counters import of_layer
from pipeline.ring.messages import HiddenReady, NeuronsPredicted
from pipeline.ring.plan import Plan
from workers.predictor.scorer import Ids, Scorer
from workers.predictor.targets import Target, targets, targets_of_choice


class Prediction:
    """Answers hidden states. Without a scorer every neuron is predicted: kind `all`."""

    def __init__(
        self,
        plan: Plan,
        scorer: Scorer | None,
        hidden: npt.NDArray[np.float32],
        predicted: npt.NDArray[np.int32],
    ) -> None:
        """`hidden` [1 + layers, rows, d_model]; `predicted` [layers, 2, most units]."""
        self._plan, self._scorer = plan, scorer
        self._hidden, self._predicted = hidden, predicted
        self._seconds = self._decode_seconds = 0.0
        self._calls = 0
        self._totals = np.zeros(plan.layers, np.int64)
        self._targets: dict[tuple[int, bool], list[Target]] = {}  # by source and `every`
        self._ahead = (-1, -1)  # step and layer of the last set that a mixture's prompt asked for early

    def handle(self, message: HiddenReady) -> Iterator[NeuronsPredicted]:
        """What to send, in this order; an answer's ids are written by then, and those behind it not yet."""
        by_choice = message.step.every and self._plan.forecast.routed and not self._plan.whole
        due = self._chosen(message) if by_choice else self._due(message.layer, message.step.every)
        self._calls += 1
        for target in due:
            if message.chosen and not (message.step.every or target.guess):
                continue  # compute has sent it to the cache itself
            started = time.perf_counter()
            answer = self._answer(message, target)
            took = time.perf_counter() - started
            self._seconds += took
            self._decode_seconds += 0.0 if message.step.every else took
            yield answer

    def _due(self, source: int, every: bool) -> list[Target]:
        """The source's targets, made once: they are the same in every step."""
        found = self._targets.get((source, every))
        if found is None:
            found = targets(self._plan.forecast, self._plan.layers, source, every)
            self._targets[source, every] = found
        return found

    def _chosen(self, message: HiddenReady) -> list[Target]:
        """Those of a prompt whose rows have chosen their experts."""
        number, source = message.step.number, message.layer
        found = targets_of_choice(
            self._plan, source, len(message.chosen), asked=(number, source) == self._ahead
        )
        self._ahead = (number, found[-1].layer) if found and found[-1].layer > source else (-1, -1)
        return found

    def _answer(self, message: HiddenReady, target: Target) -> NeuronsPredicted:
        certain = doubtful = 0
        keep: int | None = None
        if self._scorer is not None and target.layer not in self._plan.forecast.pinned:
            if target.every:
                keep = self._write(target, self._likely(self._scorer, message, target))
            elif message.step.every:
                certain, keep = self._write(target, np.array(message.chosen, np.intp)), message.kept
            else:
                certain, doubtful = self._choose(self._scorer, message, target)
        if not target.guess and not message.step.every:
            units = self._plan.units[target.layer]
            self._totals[target.layer] += units if target.every else certain + doubtful
        return NeuronsPredicted(
            run=message.run,
            step=message.step,
            layer=target.layer,
            guess=target.guess,
            every=target.every,
            certain=certain,
            doubtful=doubtful,
            keep=keep,
            done=message.done,
        )

    def _choose(self, scorer: Scorer, message: HiddenReady, target: Target) -> tuple[int, int]:
        """Write what the message's row wants; returns the numbers of certain and of doubtful neurons."""
        own = target.layer == message.layer
        certain, doubtful = scorer.wanted(target.layer, self._hidden[message.layer + 1, 0], own)
        first = self._write(target, certain)
        return first, self._write(target, doubtful, first)

    def _likely(self, scorer: Scorer, message: HiddenReady, target: Target) -> Ids:
        """The neurons that any of the message's rows predicts, ascending."""
        rows = self._hidden[message.layer + 1, : message.rows]
        own = target.layer == message.layer
        mask = scorer.active(target.layer, rows[0], own)
        for row in rows[1:]:
            mask |= scorer.active(target.layer, row, own)
        return np.flatnonzero(mask)

    def _write(self, target: Target, ids: Ids, start: int = 0) -> int:
        """Put the ids into the target's row, from `start`; returns their number."""
        self._predicted[target.layer, int(target.guess), start : start + ids.size] = ids
        return int(ids.size)

    def stats(self) -> dict[str, float]:
        """Since the start: seconds of prediction, hidden states, and neurons predicted in decode's sets."""
        values = {
            "seconds": self._seconds,
            "decode_seconds": self._decode_seconds,
            "calls": float(self._calls),
        }
        values |= {of_layer(layer, "predicted"): float(count) for layer, count in enumerate(self._totals)}
        return values
