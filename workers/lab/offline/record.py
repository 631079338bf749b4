"""The sets of a text, kept as bits: what a trace is made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from storage.store import Store
from workers.lab.offline.chooser import RingChooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.forward import Sets, forward
from workers.lab.offline.trace import Bits, Trace, pack

BLOCK_TOKENS = 4096  # that pass through a layer at once
Progress = Callable[[int, int], None]  # tokens done, of all


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
        forward(model, block, chooser, recorder.see)
        recorder.next_block(block.size)
        progress(start * rows.shape[1] + block.size, rows.size)
    return recorder.trace(meta)
