"""The true active set, from the up-projections themselves: what any predictor is measured against.

It holds half of the FFN in memory, so it is for tests and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.layout import Rows
from storage.store import Store
from workers import kernels
from workers.predictor.scorer import F32, Mask, Scorer

# Compute may sum a product in another order than this process does. A neuron this close to zero,
# relative to the layer's scores, is taken as well: with ReLU one too many adds exactly zero.
MARGIN = 1e-3


class Oracle(Scorer):
    """Scores of a layer are its pre-activations; with look-ahead, those of an earlier hidden state."""

    def __init__(self, ups: Sequence[Rows], biases: Sequence[F32]) -> None:
        """`ups`: per layer [neurons, d_model]; `biases`: [neurons]."""
        self.notes: tuple[str, ...] = ("oracle, all up-projections in memory",)
        self._ups, self._biases = ups, biases

    @classmethod
    def load(cls, store: Store) -> Oracle:
        """Read every layer's up-projection and its bias."""
        ups, biases = [], []
        for layer in range(len(store.layout.layers)):
            (up,) = store.ffn(layer, "up")
            ups.append(Rows.of_matrix(np.ascontiguousarray(up.values), up.codec))  # without the other rows
            biases.append(store.up_bias(layer))
        return cls(ups, biases)

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        scores = kernels.matvec(self._ups[layer], hidden, 1, self._biases[layer])
        scale = np.sqrt(np.mean(np.square(scores)))
        mask: Mask = scores > -MARGIN * scale
        return mask
