"""Runs a text through the model, dense or as the ring's predictors would have it, and keeps the sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.ring.messages import EMBEDDING
from storage.store import Store
from workers.lab.offline.chooser import OracleScores, RingChooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.scoring import PREFILLED
from workers.lab.offline.trace import Bits, Trace, pack

BLOCK_TOKENS = 4096  # that pass through a layer at once
Progress = Callable[[int, int], None]  # tokens done, of all


@dataclass(frozen=True, slots=True)
class Sets:
    """One layer's neurons for a block's tokens, `[n, d_ff]` bool."""

    active: torch.Tensor
    predicted: torch.Tensor | None  # None: all were computed
    guessed: torch.Tensor | None


def run_block(
    model: DenseModel,
    chooser: RingChooser | None,
    tokens: npt.NDArray[np.int64],
    see: Callable[[int, Sets], None],
) -> torch.Tensor:
    """The last layer's output of `tokens` `[rows, length]`; `see` gets every layer's sets.

    A row's first tokens, which a ring prefills, compute every neuron, whatever was predicted.
    """
    truth = OracleScores(model.store, margin=0.0)
    x = model.embed(tokens)
    states = {EMBEDDING: x.flatten(0, 1)}

    def mask(layer: int, announced: torch.Tensor, ffn_input: torch.Tensor) -> torch.Tensor | None:
        states[layer] = announced
        chosen = guessed = None
        if chooser is not None:
            guessed = chooser.guess(layer, states[chooser.guess_source(layer)])
            chosen = chooser.choose(layer, states[chooser.sources(layer)], guessed)
        see(layer, Sets(truth.active(layer, ffn_input, own=True), chosen, guessed))
        if chosen is None:
            return None
        applied = chosen.clone()
        applied.view(*tokens.shape, -1)[:, :PREFILLED] = True
        return applied

    keep = 0 if chooser is None else chooser.forecast.lookahead
    for layer in range(len(model.architecture.layers)):
        _, x = model.layer(layer, x, mask, early=chooser is not None and chooser.early)
        states.pop(layer - keep, None)
    return x


class Recorder:
    """Collects the sets of many blocks as bits."""

    def __init__(self, store: Store, tokens: int, chooser: RingChooser | None) -> None:
        shape = (len(store.layout.layers), tokens, -(-store.layout.most_units // 8))
        self._store = store
        self._at = 0  # tokens of the blocks before this one
        self._active: Bits = np.zeros(shape, np.uint8)
        self._predicted = np.zeros_like(self._active) if chooser is not None else None
        guesses = chooser is not None and chooser.forecast.refines
        self._guessed = np.zeros_like(self._active) if guesses else None

    def see(self, layer: int, sets: Sets) -> None:
        """One layer of the block at hand. Pinned layers count as chosen whole."""
        rows = slice(self._at, self._at + len(sets.active))
        self._active[layer, rows] = pack(sets.active.numpy())
        every = np.ones((1, self._store.layout.most_units), np.bool_)
        for array, mask in ((self._predicted, sets.predicted), (self._guessed, sets.guessed)):
            if array is not None:
                array[layer, rows] = pack(every if mask is None else mask.numpy())

    def next_block(self, tokens: int) -> None:
        self._at += tokens

    def trace(self, meta: dict[str, object]) -> Trace:
        layout = self._store.layout
        return Trace(
            layout.most_units,
            layout.stride,
            self._active,
            self._predicted,
            self._guessed,
            {"store": self._store.identity, "name": self._store.manifest.name, **meta},
        )


def record(
    model: DenseModel,
    chooser: RingChooser | None,
    rows: npt.NDArray[np.int64],
    meta: dict[str, object],
    progress: Progress = lambda done, total: None,
) -> Trace:
    """The trace of token rows `[rows, length]`, one after the other."""
    recorder = Recorder(model.store, rows.size, chooser)
    step = max(1, BLOCK_TOKENS // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        run_block(model, chooser, block, recorder.see)
        recorder.next_block(block.size)
        progress(start * rows.shape[1] + block.size, rows.size)
    return recorder.trace(meta)
