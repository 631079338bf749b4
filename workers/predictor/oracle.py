"""The true active set, from the up-projections themselves: what any predictor is measured against.

It holds half of the FFN in memory, so it is for tests and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.families import architecture
from storage.format import RESIDENT, Store
from storage.tensors import Tensors
from workers import kernels
from workers.predictor.scorer import F32, Mask, Scorer

# Compute may sum a product in another order than this process does. A neuron this close to zero,
# relative to the layer's scores, is taken as well: with ReLU one too many adds exactly zero.
MARGIN = 1e-3


class Oracle(Scorer):
    """Scores of a layer are its pre-activations; with look-ahead, those of an earlier hidden state."""

    def __init__(self, ups: Sequence[npt.NDArray[Any]], biases: Sequence[F32], dtype: str) -> None:
        """`ups`: per layer [d_ff, d_model] of `dtype`'s carrier; `biases`: [d_ff], or empty."""
        self.notes: tuple[str, ...] = ("oracle, all up-projections in memory",)
        self._ups, self._biases, self._dtype = ups, biases, dtype

    @classmethod
    def load(cls, store: Store) -> Oracle:
        """Read every layer's up-projection and its bias."""
        resident = Tensors(store.path / RESIDENT)
        layout = store.layout
        ups, biases = [], []
        for layer in range(layout.layers):
            ups.append(np.ascontiguousarray(store.read_layer(layer)[:, 0]))
            name = architecture.layer(layer, "up.bias")
            biases.append(
                resident.vector(name, (layout.d_ff,)) if name in resident else np.zeros(0, np.float32)
            )
        return cls(ups, biases, layout.dtype)

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        scores = kernels.matvec(self._ups[layer], hidden, self._dtype, 1, self._biases[layer])
        scale = np.sqrt(np.mean(np.square(scores)))
        mask: Mask = scores > -MARGIN * scale
        return mask
