"""A layer's matrices as the rows of its units."""

from __future__ import annotations

import numpy as np

from storage.codecs import CODECS, Carrier
from storage.layout import Role, Unit


def unit_rows(role: Role, matrix: Carrier, dtype: str, unit: Unit) -> Carrier:
    """A role's rows of all units, in the unit's codec, so that `[units, -1]` has a unit in each line.

    `matrix` is the checkpoint's in the codec `dtype`: gate and up [neurons, d_model], down
    [d_model, neurons].
    What has the unit's codec already is moved and not rounded again.
    """
    target, source = unit.codec(role), CODECS[dtype]
    if role != "down":
        return matrix if target is source else target.narrow(source.widen(matrix))
    if unit.width == 1:  # a neuron's down row is its column
        if target is source and source.grouped is None:
            return matrix.T
        return target.narrow(np.ascontiguousarray(source.widen(matrix).T))
    if target is not source:
        matrix = target.narrow(source.widen(matrix))
    if target.grouped is not None:
        return target.grouped.cut(matrix, matrix.shape[1] // target.elements(unit.width))
    return matrix.reshape(unit.d_model, -1, unit.width).swapaxes(0, 1)
