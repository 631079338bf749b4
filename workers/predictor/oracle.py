"""The true active set, from the projections that decide it: what any predictor is measured against.

It holds a third or half of the FFN in memory, so it is for tests and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.layout import Rows
from storage.store import Decider, Store
from workers import kernels
from workers.predictor.scorer import F32, Mask, Scorer

# Compute may sum a product in another order than this process does. A neuron this close to zero,
# relative to the layer's scores, is taken as well: with ReLU one too many adds exactly zero.
MARGIN = 1e-3


class Oracle(Scorer):
    """Scores of a layer are its pre-activations; with look-ahead, those of an earlier hidden state."""

    def __init__(self, layers: Sequence[Sequence[Decider]]) -> None:
        """Of each layer what decides: a neuron is active where all its scores are positive."""
        self.notes: tuple[str, ...] = ("oracle, all deciding projections in memory",)
        self._layers = layers

    @classmethod
    def load(cls, store: Store) -> Oracle:
        """Read every layer's deciding projections and their biases."""
        layers = []
        for layer in range(len(store.layout.layers)):
            own = [
                Decider(Rows.of_matrix(np.ascontiguousarray(one.rows.values), one.rows.codec), one.bias)
                for one in store.deciding(layer)
            ]  # without the other rows
            layers.append(own)
        return cls(layers)

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        first, *others = (_positive(one, hidden) for one in self._layers[layer])
        for other in others:
            first &= other
        return first


def _positive(decider: Decider, hidden: F32) -> Mask:
    scores = kernels.matvec(decider.rows, hidden, 1, decider.bias)
    scale = np.sqrt(np.mean(np.square(scores)))
    mask: Mask = scores > -MARGIN * scale
    return mask
