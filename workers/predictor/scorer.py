"""What predicts: a score per neuron of a layer, from one hidden row."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]

NOTHING: Ids = np.zeros(0, np.intp)


class Scorer(Protocol):
    """A kind of predictor, loaded."""

    notes: tuple[str, ...]  # choices worth telling the user

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        """The neurons of `layer` that are likely active, [d_ff].

        `hidden` [d_model] is the layer's own FFN input, or, unless `own`, a source look-ahead
        layers before it.
        """

    def wanted(self, layer: int, hidden: F32, own: bool) -> tuple[Ids, Ids]:
        """The same as ids, each ascending: what is certain, and what is wanted only where it is resident.

        A guess may be in an order of its own, likeliest first.
        """
        return np.flatnonzero(self.active(layer, hidden, own)), NOTHING
