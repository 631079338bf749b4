"""A hidden state as predictions: ids into the shared rows, messages out."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from pipeline.ring.counters import of_layer
from pipeline.ring.messages import EVERY, HiddenReady, NeuronsPredicted
from workers.predictor.scorer import Ids, Scorer
from workers.predictor.targets import Mode, Target, targets


class Prediction:
    """Answers hidden states. Without a scorer every neuron is predicted: kind `all`."""

    def __init__(
        self,
        mode: Mode,
        scorer: Scorer | None,
        hidden: npt.NDArray[np.float32],
        predicted: npt.NDArray[np.int32],
    ) -> None:
        """`hidden` [1 + layers, rows, d_model]; `predicted` [layers, 2, d_ff]."""
        self._mode, self._scorer = mode, scorer
        self._hidden, self._predicted = hidden, predicted
        self._seconds = self._decode_seconds = 0.0
        self._calls = 0
        self._totals = np.zeros(mode.layers, np.int64)

    def handle(self, message: HiddenReady) -> list[NeuronsPredicted]:
        """What to send, in this order; the ids are written by then."""
        started = time.perf_counter()
        answers = [
            self._answer(message, target) for target in targets(self._mode, message.layer, message.stream)
        ]
        took = time.perf_counter() - started
        self._seconds += took
        self._decode_seconds += 0.0 if message.stream else took
        self._calls += 1
        return answers

    def _answer(self, message: HiddenReady, target: Target) -> NeuronsPredicted:
        count = keep = EVERY
        if self._scorer is not None and target.layer not in self._mode.pinned:
            listed = self._write(target, self._ids(message, target))
            count, keep = (EVERY, listed) if target.every else (listed, 0)
        if not target.guess and not message.stream:
            self._totals[target.layer] += self._predicted.shape[2] if count == EVERY else count
        return NeuronsPredicted(
            message.run, message.step, target.layer, count, keep, target.guess, message.stream, message.done
        )

    def _ids(self, message: HiddenReady, target: Target) -> Ids:
        """What the message's row wants, or, in prefill, the neurons that any of its rows predicts."""
        assert self._scorer is not None
        rows = self._hidden[message.layer + 1, : message.rows]
        own = target.layer == message.layer
        if not message.stream:
            return self._scorer.wanted(target.layer, rows[0], own)
        mask = self._scorer.active(target.layer, rows[0], own)
        for row in rows[1:]:
            mask |= self._scorer.active(target.layer, row, own)
        return np.flatnonzero(mask)

    def _write(self, target: Target, ids: Ids) -> int:
        """Put the ids into the target's row; returns their number."""
        self._predicted[target.layer, int(target.guess), : ids.size] = ids
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
